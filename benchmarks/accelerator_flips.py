"""Counts answers of a checkpoint that differ between the accelerator and the CPU of the machine."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import accelerator_models as models
import jax
from accelerator_record import Record

from llava_sp_jax.infer import pretrained
from llava_sp_jax.infer.engine import Answer, Engine, Request
from llava_sp_jax.tasks.easy_vqa import EasyVqa

# Each way against float32 on the CPU: (dtype, model.matmul_precision).
WAYS = (("float32", "auto"), ("float32", "default"), ("bfloat16", "auto"))
NEEDED = 60  # seconds for a way
BATCH = 64


def flips(record: Record) -> None:
  """Asks as many questions as the CPU answers in its share of the time, in each way."""
  options = record.options
  if not options.checkpoint:
    record.say("flips", skipped="no --checkpoint and --data")
    return
  batch = 2 if options.tiny else BATCH
  task = EasyVqa(options.data)
  requests = [Request(item.question, item.images) for item in task.items()]
  until = time.monotonic() + (record.left() - NEEDED * len(WAYS)) / 2 * (not options.tiny)
  expected: list[Answer] = []

  def model(dtype: str, precision: str) -> Any:
    loaded = pretrained.from_run(options.checkpoint, dtype=dtype)
    changed = dataclasses.replace(loaded.config.model, matmul_precision=precision)
    config = dataclasses.replace(loaded.config, model=changed)
    return dataclasses.replace(loaded, config=config)

  def on_the_cpu() -> dict[str, Any]:
    cpu = models.one_mesh(jax.devices("cpu")[0])
    answering = Engine(model("float32", "auto"), batch, task.generation, cpu)
    for answer in answering.answer(requests):
      expected.append(answer)
      if time.monotonic() > until and len(expected) >= 2 * batch:
        break
    return {"questions": len(expected), "of": len(requests)}

  if not record.part("flips", NEEDED, on_the_cpu, case="float32 on the CPU"):
    return
  for dtype, precision in WAYS:

    def ask(dtype: str = dtype, precision: str = precision) -> dict[str, Any]:
      mesh = models.one_mesh(models.device())
      answering = Engine(model(dtype, precision), batch, task.generation, mesh)
      started = time.perf_counter()
      found = list(answering.answer(requests[: len(expected)]))
      seconds = time.perf_counter() - started
      return {**compare(expected, found), "questions_per_s": len(found) / seconds}

    record.part("flips", NEEDED, ask, dtype=dtype, matmul_precision=precision)


def compare(expected: list[Answer], found: list[Answer]) -> dict[str, Any]:
  """How many answers have other tokens, and the margins of their closest choices, in logits.

  Raises: ValueError for an answer that is an error: two of them would count as the same.
  """
  for answer in (*expected, *found):
    if answer.error:
      raise ValueError(f"a question has no answer: {answer.error}")
  margins = [
    min(a.margin, b.margin) for a, b in zip(expected, found, strict=True) if a.ids != b.ids
  ]
  return {
    "questions": len(found),
    "changed": len(margins),
    "largest_margin_changed": max(margins, default=None),
  }
