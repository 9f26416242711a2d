"""Defines the scores of a benchmark, from the merged answers to scores.json, tables and the page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from llava_sp_jax.json_files import NUMBER, fits
from llava_sp_jax.results import predictions
from llava_sp_jax.results.compare import Compared
from llava_sp_jax.results.interval import Interval
from llava_sp_jax.tasks.task import EvalError

FILE = "scores.json"
# Keys that scores.json must have to be shown, and the types of their values.
INTERVAL = {"of": str, "method": str, **dict.fromkeys(("mean", "low", "high", "level"), NUMBER)}
SCHEMA = {
  **dict.fromkeys(("task", "protocol", "metric", "data_hash"), str), "headline": (NUMBER, NoneType),
  "by_kind": {"all": {"items": NUMBER, "asked": NUMBER}}, "figures": dict, "asked": int,
  "interval": (INTERVAL, NoneType), "failures": [{"id": str, "error": str}], "submission": [str],
}  # fmt: skip
# Keys that an older version did not write: their values are checked where they are.
LATER = {
  "variant": dict, "questions": int, "answered": int, "left_out": [{"id": str, "error": str}],
  "checkpoint": str, "step": int, "engine": dict,
}  # fmt: skip
COMPARED = {
  "folder": str, **dict.fromkeys(("both", "fixed", "broken", "changed", "p_value"), NUMBER)
}  # fmt: skip
NULLABLE = ("headline", "interval")  # written as null; any other part that is None is left out
SETTINGS = ("fingerprint", "inputs", "model", "generation", "version")  # copied from settings.json


@dataclasses.dataclass(frozen=True)
class Unscored:
  """Names a question that the scores leave out, and why."""

  id: str
  error: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkScores:
  """Holds the scores of a model on a benchmark, and all that they depend on.

  The fields are the keys of scores.json, in its order. A field that may be None and has that
  default is one that not every result has: a key of an older version, or of a run that compares.
  """

  task: str
  protocol: str  # name and description of the exact rule
  variant: Mapping[str, str]  # options that distinguish two scores of a task: protocol, split
  headline: float | None  # None if a server scores, or nothing could be scored
  metric: str  # what the headline measures, or why it is None
  by_kind: Mapping[str, Mapping[str, float]]  # "all" and each kind: figures, `items` and `asked`
  figures: Mapping[str, object]  # other results of the protocol, e.g. `unjudged`
  interval: Interval | None  # of the mean score of the answers; None without two images
  asked: int  # questions that were asked
  answered: int  # questions with an answer
  failures: tuple[Unscored, ...]  # questions without an answer
  left_out: tuple[Unscored, ...]  # questions that cannot be scored, e.g. without a truth
  checkpoint: str | None = None  # folder of the model
  step: int | None = None
  data_hash: str
  fingerprint: Mapping[str, str] | None = None  # of the frozen base, and of all parameters
  inputs: Mapping[str, object] | None = None  # template, tokenizer and preprocessing of images
  model: Mapping[str, object] | None = None  # sizes and dtype
  generation: Mapping[str, object] | None = None  # settings of generation
  version: str | None = None  # of this package
  engine: Mapping[str, float]  # counters of the engine, over all sessions
  sessions: int | None = None  # runs that answered
  sessions_damaged: int | None = None  # lines of sessions that could not be read; None: 0
  seconds: float | None = None  # over all sessions
  submission: tuple[str, ...]  # files for an official server or scorer, below the result folder
  questions: int  # all questions of the benchmark; more than `asked` with a limit
  compared: Compared | None = None  # with the answers of another run


def write(path: Path, scores: BenchmarkScores) -> None:
  """Writes scores.json atomically."""
  values = dataclasses.asdict(scores)
  there = {k: value for k, value in values.items() if value is not None or k in NULLABLE}
  predictions.replace(path, json.dumps(there, indent=2) + "\n")


def read(path: Path) -> BenchmarkScores:
  """Reads scores.json, also of an older version, which has fewer keys.

  Raises: EvalError when the file is damaged or lacks keys that all versions have.
  """
  found = predictions.read_json(path)
  if found is None or not _is_valid(found):
    raise EvalError(f"{path}: damaged; llava-sp eval --merge --out {path.parent} writes it anew")
  names = {field.name for field in dataclasses.fields(BenchmarkScores)}
  older = {"variant": {}, "questions": found["asked"], "engine": {}, "left_out": []}
  older["answered"] = found["asked"] - len(found["failures"])
  values = older | {name: value for name, value in found.items() if name in names}
  for name in ("failures", "left_out"):
    values[name] = tuple(Unscored(row["id"], row["error"]) for row in values[name])
  values["submission"] = tuple(values["submission"])
  for name, keys, make in (("interval", INTERVAL, Interval), ("compared", COMPARED, Compared)):
    if values.get(name) is not None:
      values[name] = make(**{key: values[name][key] for key in keys})
  return BenchmarkScores(**values)


def _is_valid(found: dict[str, Any]) -> bool:
  """Returns whether a file has the parts that must be there, each of its kind."""
  later = {key: kind for key, kind in (LATER | {"compared": COMPARED}).items() if key in found}
  return fits(found, SCHEMA) and fits(found, later) and all(map(_is_row, found["by_kind"].values()))


def _is_row(row: Any) -> bool:
  """Returns whether a row of `by_kind` has only numbers, among them `items` and `asked`."""
  counted = {"items": NUMBER, "asked": NUMBER}
  return fits(row, counted) and all(fits(value, NUMBER) for value in row.values())
