"""Measures decoding, prefill, and questions per second of the engine, on random weights."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

import accelerator_models as models
import jax
import numpy as np
from accelerator_record import Record
from eval_sides import WORKLOADS, write_images, write_tokenizer
from flax.traverse_util import flatten_dict

from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.infer import decode as decode_lib
from llava_sp_jax.infer import prefill as prefill_lib
from llava_sp_jax.infer.counts import Counts
from llava_sp_jax.infer.engine import Engine, EngineLayout, Generation, Request
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.infer.programs import Programs

FORMATS = ("none", "int8")  # of the decoder's kernels
ROUNDS = 3  # measurements of a batch


def _programs(size: models.Size, quantize: str) -> tuple[Any, Programs]:
  """Builds the engine's programs; answers never stop by themselves."""
  config = models.config_of(size, 1, 0, quantize=quantize)
  device_mesh = models.one_mesh(models.device())
  vocabulary = config.model.language_model.vocab_size
  strategy = decode_lib.Sampling(decode_lib.StopRule((), _room(size), vocabulary))
  with jax.set_mesh(device_mesh):
    params = models.answering_params(config, device_mesh)
    return config, Programs(config, params, strategy, device_mesh, Counts())


def _room(size: models.Size) -> int:
  """Counts the new tokens of a row, over all measurements of a batch."""
  return size.steps * (ROUNDS + 1)


def decode(record: Record) -> None:
  """Measures tokens per second after full prompts, and the time to read kernels and cache."""
  size = models.size_of(record)
  for quantize in FORMATS:
    held: list[Any] = []

    def load(quantize: str = quantize, held: list[Any] = held) -> None:
      held.extend(_programs(size, quantize))

    if not record.part("decode", 30, load, quantize=quantize):
      continue
    for batch in size.batches:
      labels = {"batch": batch, "quantize": quantize, "positions": size.prompt}
      record.part("decode", 45, lambda: _decoded(record, size, *held, batch), **labels)  # noqa: B023
    held.clear()


def _decoded(
  record: Record, size: models.Size, config: Any, programs: Programs, batch: int
) -> dict[str, Any]:
  capacity = size.prompt + _room(size)
  state = programs.state(batch, capacity)
  length = jax.device_put(np.full(batch, size.prompt, np.int32), state.cache.length.sharding)
  going = jax.device_put(np.zeros(batch, bool), state.rows.done.sharding)
  state = state._replace(
    cache=state.cache._replace(length=length), rows=state.rows._replace(done=going)
  )
  nobody, never = np.zeros(batch, bool), batch + 1
  started = time.monotonic()
  state, _ = programs.decode(state, nobody, 1, never)
  compile_s, found = time.monotonic() - started, []
  for _ in range(ROUNDS):
    started = time.perf_counter()
    state, report = programs.decode(state, nobody, size.steps, never)
    jax.block_until_ready(state)
    found.append((time.perf_counter() - started) / int(report.steps))
  text = config.model.language_model
  kernels = sum(
    x.nbytes
    for path, x in flatten_dict(programs._params, sep="/").items()
    if path.startswith("language_model/") and "token_embed" not in path
  )
  cache = 2 * text.layers * batch * capacity * text.kv_heads * text.head_dim * 2
  rate = record.last("rates", "read_gb_s")
  limit = (kernels + cache) / (rate * 1e9) / min(found) if rate else None
  return {
    "tokens_per_s": batch / min(found),
    "step_ms": 1e3 * min(found),
    "of_memory_limit": limit,
    "compile_s": compile_s,
  }


def prefill(record: Record) -> None:
  """Measures positions per second of whole prompts without an image."""
  size = models.size_of(record)
  held: list[Any] = []
  if not record.part("prefill", 30, lambda: held.extend(_programs(size, "none"))):
    return
  for rows in (8, 1) if not record.options.tiny else (1,):
    record.part(
      "prefill",
      40,
      functools.partial(_prefilled, record, size, *held, rows),
      batch=rows,
      positions=size.prompt,
    )


def _prefilled(
  record: Record, size: models.Size, config: Any, programs: Programs, rows: int
) -> dict[str, Any]:
  text = config.model.language_model
  tokens = np.random.default_rng(0).integers(0, text.vocab_size, (rows, size.prompt), np.int32)
  full = np.full(rows, size.prompt, np.int32)
  group = prefill_lib.Group(tokens, np.full_like(tokens, -1), full, full * 0, (), ())
  seconds = models.best(lambda: programs.grow(group, size.prompt))
  heads = (2 * text.heads + 2 * text.kv_heads) * text.head_dim
  layer = text.width * heads + 3 * text.width * text.mlp_width
  causal = text.heads * text.head_dim * (size.prompt + 1)  # both products, half of the square
  needed = 2 * rows * size.prompt * text.layers * (layer + causal)
  return {
    "seconds": seconds,
    "tokens_per_s": rows * size.prompt / seconds,
    "mfu": needed / seconds / models.peak_flops(record),
  }


def engine(record: Record) -> None:
  """Measures questions per second, with one question about each image and with several."""
  record.part("engine", 90, lambda: _engine(record))


def _engine(record: Record) -> None:
  size = models.size_of(record)
  several = 2 if record.options.tiny else 6  # questions about an image
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write_tokenizer(folder / "tokenizer")
    images = write_images(folder / "images", size.questions)
    config = models.config_of(size, 1, 0)
    device_mesh = models.one_mesh(models.device())
    with jax.set_mesh(device_mesh):
      params = models.answering_params(config, device_mesh)
    loaded = Pretrained(config, params, Tokenizer(folder / "tokenizer"))
    batch = 2 if record.options.tiny else 32
    new = 2 if record.options.tiny else 8
    answering = Engine(
      loaded, batch, Generation(max_new_tokens=new), device_mesh, EngineLayout(groups=batch)
    )
    del params, loaded
    ask = {name: workload[3] for name, workload in WORKLOADS.items()}
    asked = {
      "one question an image": [Request(ask["vizwiz"](0), (image,)) for image in images],
      f"{several} questions an image": [
        Request(ask["pope"](i), (image,))
        for image in images[: len(images) // several]
        for i in range(several)
      ],
    }
    started = time.monotonic()
    answering.warm_up([request for requests in asked.values() for request in requests[:several]])
    record.say("engine", compile_s=time.monotonic() - started, batch=batch)
    for workload, requests in asked.items():
      answering.forget()
      before = dataclasses.asdict(answering.counts)
      started = time.perf_counter()
      failed = sum(bool(answer.error) for answer in answering.answer(requests))
      seconds = time.perf_counter() - started
      counts = {k: v - before[k] for k, v in dataclasses.asdict(answering.counts).items()}
      record.say(
        "engine",
        workload=workload,
        questions=len(requests),
        failed=failed,
        questions_per_s=len(requests) / seconds,
        compiles=counts["compiles"],
        decode_steps=counts["decode_steps"],
        new_tokens=counts["new_tokens"],
      )
