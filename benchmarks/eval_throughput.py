"""Compares the engine with a torch loop on this machine: same weights, same questions, float32.

Usage: python benchmarks/eval_throughput.py [--minutes 20] [--repeats 3] [--out docs/results/eval_throughput]

Uses random weights of realistic shapes: a CLIP tower with a 24x24 grid and a decoder with the shape
of SmolLM2-135M. Answers have a fixed number of tokens. Needs torch (the extra `test`). Exits with
code 1 if the answers of the two sides differ, because their times are then not comparable.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from eval_parts import PROMPT, STARTED, STEPS, medians, parts, said, timed, turns
from eval_sides import SIZES, WORKERS, WORKLOADS, Bench, write_images, write_tokenizer

from llava_sp_jax import provenance

VARIANTS = ("none", "pooling", "cropping")
# Programs of the engine, and their names on the page.
PROGRAMS = {"encode": "images", "grow": "shared prefixes", "admit": "the rest of prompts",
            "decode": "decoding"}  # fmt: skip


def workload(bench: Bench, name: str, repeats: int) -> dict[str, Any]:
  requests, new = bench.requests(WORKLOADS[name]), WORKLOADS[name][2]
  engine = bench.engine(new)
  list(engine.answer(requests))  # compiles
  bench.torch_answers(requests[:1], new, WORKERS)
  compiles, found = engine.counts.compiles, {}

  def ours() -> float:
    engine.forget()
    seconds, found["ours"] = timed(lambda: [a.ids for a in engine.answer(requests)])
    return seconds

  def theirs() -> float:
    result = bench.torch_answers(requests, new, WORKERS)
    found["torch"] = result["ids"]
    return result["seconds"]

  one, other = medians(repeats, ours, theirs)
  assert engine.counts.compiles == compiles, "nothing compiles after the warm-up"
  same = sum(a == b for a, b in zip(found["ours"], found["torch"], strict=True))
  return {
    "workload": name,
    "ours_qps": len(requests) / one,
    "torch_qps": len(requests) / other,
    "ratio": other / one,
    "machine": machine(),
    "questions": len(requests),
    "same_answers": same,
    "shares": shares(engine, requests),
  }


def shares(engine: Any, requests: list[Any]) -> dict[str, float]:
  """Returns the share of each kind of program (each waited for) and of the host in one run."""
  import jax

  programs, taken = engine._programs, {}
  plain = programs._run

  def waited(key: Any, *arguments: Any, **more: Any) -> Any:
    seconds, result = timed(lambda: jax.block_until_ready(plain(key, *arguments, **more)))
    taken[key[0]] = taken.get(key[0], 0.0) + seconds
    return result

  programs._run = waited
  engine.forget()
  whole, _ = timed(lambda: list(engine.answer(requests)))
  del programs._run
  return {**{k: v / whole for k, v in taken.items()}, "host": 1 - sum(taken.values()) / whole}


def first_tokens(benches: list[Bench], repeats: int) -> list[dict[str, Any]]:
  """Measures time to the first token, tokens per second, and FLOPs of each variant, from a new
  image.

  All rows take turns, and each is compared with the first of its own turn: the machine's speed
  drifts by more than what they differ in.
  """
  sides: list[Callable[[], float]] = []
  for bench in benches:
    requests = bench.requests((1, 1, 1, lambda i: "what is it?"))
    engines = bench.engine(1, 1), bench.engine(STEPS, 1)
    for engine in engines:
      next(engine.answer(requests))
    bench.torch_answers(requests, 1, 0)

    def ours(engine: Any, requests: list[Any] = requests) -> float:
      engine.forget()
      return timed(lambda: list(engine.answer(requests)))[0]

    def theirs(new: int, bench: Bench = bench, requests: list[Any] = requests) -> float:
      return bench.torch_answers(requests, new, 0)["seconds"]

    sides += [functools.partial(ours, engine) for engine in engines]
    sides += [functools.partial(theirs, new) for new in (1, STEPS)]
  taken = turns(first_token_turns(repeats), *sides)
  names = ("first", "whole", "torch_first", "torch_whole")
  records = []
  for i, bench in enumerate(benches):
    mine = {name: [turn[len(names) * i + k] for turn in taken] for k, name in enumerate(names)}
    base = {name: [turn[k] for turn in taken] for k, name in enumerate(names)}
    more = {
      n: statistics.median(a / b for a, b in zip(mine[n], base[n], strict=True)) - 1
      for n in ("first", "torch_first")
    }
    middle = {name: statistics.median(seconds) for name, seconds in mine.items()}
    records.append(
      {
        "variant": bench.variant,
        "first_token_ms": 1e3 * middle["first"],
        "against_none": more["first"],
        "torch_first_token_ms": 1e3 * middle["torch_first"],
        "torch_against_none": more["torch_first"],
        "tokens_per_s": STEPS / middle["whole"],
        "torch_tokens_per_s": STEPS / middle["torch_whole"],
        "gflops": flops(bench.config) / 1e9,
      }
    )
    said(records[-1])
  return records


def first_token_turns(repeats: int) -> int:
  """Takes more repeats: variants differ by less than the noise of one."""
  return 3 * repeats


def flops(config: Any) -> float:
  """Counts the matmul FLOPs, as XLA does, of an image and a prompt of its tokens and 60 of text."""
  import jax
  import jax.numpy as jnp

  from llava_sp_jax.models import build

  module = build.unstacked(build.model(config.model))
  params = jax.eval_shape(build.unstack, build.abstract(config.model))
  length = build.image_token_count(config.model) + 60
  ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
  side = config.model.tower.image_size
  pixels = jax.ShapeDtypeStruct((1, 1, side, side, 3), jnp.float32)
  run = jax.jit(lambda p, *x: module.apply({"params": p}, *x))
  return float(run.lower(params, ids, ids, ids, pixels, ids).cost_analysis()["flops"])


def machine() -> str:
  return f"{os.cpu_count()} cores {platform.machine()}, CPU, Python {platform.python_version()}"


def page(result: dict[str, Any]) -> str:
  lines = [
    "# Evaluation throughput: the engine against a torch loop",
    "",
    f"Made by `python benchmarks/eval_throughput.py --repeats {result['repeats']}`: random weights "
    f"(`{result['size']}`), float32, "
    f"medians of {result['repeats']}, both sides in one run on {result['machine']}. The other side "
    "is transformers one question at a time behind a DataLoader, as the original evaluates.",
    "",
    "| workload | questions | ours, questions/s | torch | ratio | same answers |",
    "|---|---|---|---|---|---|",
  ]
  lines += [
    f"| {r['workload']} | {r['questions']} | {r['ours_qps']:.2f} | {r['torch_qps']:.2f} | "
    f"{r['ratio']:.2f} | {r['same_answers']} |"
    for r in result["records"]
  ]
  lines += [
    "",
    "Where our seconds go (every program waited for in a run of its own):",
    "",
    f"| workload | {' | '.join(PROGRAMS.values())} | host |",
    f"|---|{'---|' * (len(PROGRAMS) + 1)}",
  ]
  for r in result["records"]:
    cells = (f"{100 * r['shares'].get(name, 0):.0f}%" for name in (*PROGRAMS, "host"))
    lines.append(f"| {r['workload']} | {' | '.join(cells)} |")
  if result["parts"]:
    peak = result["parts"][0]
    lines += [
      "",
      f"Alone, {PROMPT} positions a row. The limit is what must be read or multiplied, at what "
      f"XLA reaches here: {peak['read_gb_s']:.1f} GB/s, {peak['matmul_gflop_s']:.0f} GFLOP/s.",
      "",
      "| part | batch | ours, tokens/s | torch | ratio | bound by | of that limit |",
      "|---|---|---|---|---|---|---|",
    ]
  lines += [
    f"| {r['part']} | {r['batch']} | {r['ours_tokens_per_s']:.0f} | {r['torch_tokens_per_s']:.0f} | "
    f"{r['ratio']:.2f} | {r['bound']} | {100 * r['of_bound']:.0f}% |"
    for r in result["parts"]
  ]
  lines += [
    "",
    "From a new image to the first token, one question alone, medians of "
    f"{first_token_turns(result['repeats'])} turns; tokens/s with it included:",
    "",
    "| variant | first token, ms | against none | torch, ms | against none | tokens/s | torch | GFLOP |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for r in result["variants"]:
    lines.append(
      f"| {r['variant']} | {r['first_token_ms']:.0f} | {100 * r['against_none']:+.1f}% | "
      f"{r['torch_first_token_ms']:.0f} | {100 * r['torch_against_none']:+.1f}% | {r['tokens_per_s']:.1f} | "
      f"{r['torch_tokens_per_s']:.1f} | {r['gflops']:.1f} |"
    )
  return "\n".join(lines) + "\n"


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", choices=SIZES, default="smol", help="of the decoder (%(default)s)")
  parser.add_argument("--repeats", type=int, default=3, help="medians of so many (%(default)s)")
  parser.add_argument(
    "--minutes", type=float, default=20, help="starts no part after this (%(default)s)"
  )
  parser.add_argument("--out", type=Path, default=Path("docs/results/eval_throughput"))
  options = parser.parse_args()
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  result: dict[str, Any] = {
    "machine": machine(),
    "size": options.size,
    "repeats": options.repeats,
    "records": [],
    "parts": [],
    "variants": [],
  }

  def time_left() -> bool:
    return time.monotonic() - STARTED < 60 * options.minutes

  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write_tokenizer(folder / "tokenizer")
    images = write_images(folder / "images", 16)
    bench = Bench("pooling", options.size, folder, images)
    said({"loaded": options.size, **bench.torch.about})
    for task in WORKLOADS:
      result["records"].append(workload(bench, task, options.repeats))
      said(result["records"][-1])
    if time_left():
      result["parts"] = parts(bench, options.repeats)
    benches = [bench]
    if time_left():
      benches = [
        bench
        if variant == bench.variant
        else Bench(variant, options.size, folder, images, bench.model)
        for variant in VARIANTS
      ]
      result["variants"] = first_tokens(benches, options.repeats)
    for each in benches:
      each.torch.close()
  provenance.write(options.out, result)
  provenance.named(options.out, "md").write_text(page(result))
  print(f"written: {options.out}.md, {options.out}.json, {time.monotonic() - STARTED:.0f} s")
  return differing(result["records"])


def differing(records: list[dict[str, Any]]) -> int:
  """Prints a sentence and returns 1 if the answers of the two sides differ."""
  asked = sum(r["questions"] for r in records)
  same = sum(r["same_answers"] for r in records)
  if same < asked:
    print(f"{asked - same} of {asked} answers are not those of torch", file=sys.stderr)
  return int(same < asked)


if __name__ == "__main__":
  sys.exit(main())
