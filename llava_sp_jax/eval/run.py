"""Runs a task through the engine: predictions as they come, then scores."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sp_jax.data import image
from llava_sp_jax.data.conversation import SampleError
from llava_sp_jax.eval import task as task_lib
from llava_sp_jax.eval.tasks.easy_vqa import EasyVqa
from llava_sp_jax.infer.engine import Engine, Request

TASKS: dict[str, Callable[[str], task_lib.Task]] = {"easy_vqa": EasyVqa}

SECONDS_PER_LINE = 5.0  # of progress


def run(
  task: task_lib.Task, engine: Engine, out: str | Path, limit: int = 0, about: Any = None
) -> dict[str, Any]:
  """Answers every item, writes `predictions.jsonl` and `scores.json` in `out`, returns the scores.

  An item whose image cannot be read is counted in `failed` and written with its error; scores are
  over the answered items.
  """
  folder = Path(out)
  folder.mkdir(parents=True, exist_ok=True)
  items = task.items()[: limit or None]
  failed: list[dict[str, str]] = []
  problems = {path: _problem(path) for path in {item.image for item in items}}
  good = []
  for item in items:
    if problems[item.image]:
      failed.append({"id": item.id, "error": problems[item.image]})
    else:
      good.append(item)
  asked, to_ask = itertools.tee(good)
  answers = engine.answer(
    Request(item.question, (item.image,) if item.image else ()) for item in to_ask
  )
  records: list[dict[str, Any]] = []
  started = said = time.monotonic()
  with (folder / "predictions.jsonl").open("w") as file:
    for item, answer in zip(asked, answers, strict=True):
      record = {
        "id": item.id, "question": item.question, "image": str(item.image), "truth": item.truth,
        "kind": item.kind, "text": answer.text, "right": task.right(item, answer.text),
      }  # fmt: skip
      records.append(record)
      file.write(json.dumps(record) + "\n")
      now = time.monotonic()
      if now - said >= SECONDS_PER_LINE or len(records) == len(good):
        said = now
        _progress(records, len(good), started)
  scores = {
    "task": task.name, "protocol": task.protocol, "data_hash": task.data_hash(),
    "by_kind": task_lib.accuracy_by_kind(records), "failed": failed,
    "seconds": round(time.monotonic() - started, 1), **(about or {}),
  }  # fmt: skip
  (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
  return scores


def _problem(path: Path | None) -> str:
  """Why an image cannot be read, or nothing; each image is asked once, not once a question."""
  try:
    if path is not None:
      image.read(path)
    return ""
  except SampleError as error:
    return str(error)


def _progress(records: list[dict[str, Any]], total: int, started: float) -> None:
  rate = len(records) / (time.monotonic() - started)
  right = sum(r["right"] for r in records) / len(records)
  left = (total - len(records)) / rate
  print(
    f"{len(records):>6}/{total} questions  right {right:.4f}  {rate:.0f}/s  eta {left:.0f} s",
    flush=True,
  )
