"""Defines a benchmark: items with question, images and ground truth, and rules to score answers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from llava_sp_jax import files as regular
from llava_sp_jax.errors import LlavaSPError
from llava_sp_jax.infer.generation import Generation


class EvalError(LlavaSPError, RuntimeError):
  """Reports an evaluation that cannot continue: what was found, and what to do."""


@dataclasses.dataclass(frozen=True)
class Item:
  """Holds one question of a benchmark, with its images and its ground truth."""

  id: str  # unique within a task
  question: str
  images: tuple[Path | bytes, ...]  # paths, or the bytes of encoded files
  kind: str  # category for the report
  truth: Any  # can be written as JSON; None if only a server knows it
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # used by the task's own rules
  problem: str = ""  # why answers cannot be scored, e.g. a truth that is missing; "": they can


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Holds a model's answer, or in `error` why there is none."""

  id: str
  text: str
  error: str = ""


@dataclasses.dataclass(frozen=True)
class Scores:
  """Holds the scores of a task over all predictions; all values can be written as JSON.

  `by_kind` maps "all" and each kind to figures in [0, 1] or points. It always has `items` (the
  number of items in the figures) and `asked` (the number of all items). `figures` holds other
  results of the protocol (e.g. `unjudged`, the answers that a judge could not score). `headline` is
  None if a server scores, or nothing could be scored. `verdicts` holds by item id what a judge
  found for single answers; it takes precedence over `Task.verdict`.
  """

  headline: float | None
  metric: str  # what the headline measures, or why it is None
  by_kind: dict[str, dict[str, float]]
  figures: dict[str, Any] = dataclasses.field(default_factory=dict)
  verdicts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


Predictions = Mapping[str, Prediction]  # by the item's id


class Task(Protocol):
  """Defines the members of a benchmark. A user's own class needs no base class."""

  name: str
  protocol: str  # name and description of the exact rule
  generation: Generation  # settings of generation that the protocol demands

  def items(self) -> list[Item]:
    """Returns the questions, always in the same order, since a limit takes the first ones."""
    ...

  def data_hash(self) -> str:
    """Returns a hash of the files that determine the questions; it tells other questions apart."""
    ...

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    """Returns what can be said of one answer, with `score` in [0, 1] if it can be scored alone.

    `text` is the answer. Returns {} if a server, a judge or the whole set decides.
    """
    ...

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns the scores over the predictions for `items`, which may be only the first ones."""
    ...

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """Writes the files for an official server or scorer to `folder`; returns their paths."""
    ...


def file_hash(path: Path) -> str:
  """Returns the first 16 hexadecimal digits of a file's SHA-256.

  Raises: FormatError for what is not a regular file, so that a pipe does not block.
  """
  file: Any = regular.open_regular(path)
  with file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def text_of(predictions: Predictions, item: Item) -> str | None:
  """Returns the text of the answer to an item; None if it was not asked or failed."""
  found = predictions.get(item.id)
  return None if found is None or found.error else found.text


def mean_by_kind(
  items: Iterable[Item],
  predictions: Predictions,
  verdict: Callable[[Item, str], dict[str, Any]],
  metric: str = "accuracy",
  missing: float | None = None,
) -> dict[str, dict[str, float]]:
  """Returns {kind: {metric, items, asked}} with the mean score of each kind, "all" first.

  `items` counts the scored answers, `asked` all items. Items with a problem are never scored. Items
  without an answer are left out, or score `missing` if it is given, as in some originals. A kind
  without any scored item has the metric 0.0 and 0 items. `metric` is the name of the mean.
  """
  groups: dict[str, list[float | None]] = {"all": []}
  for item in items:
    text = text_of(predictions, item)
    score = None
    if not item.problem:
      score = missing if text is None else float(verdict(item, text)["score"])
    groups["all"].append(score)
    if item.kind != "all":  # an item of a kind with that name would count twice
      groups.setdefault(item.kind, []).append(score)
  result = {}
  for kind, scores in groups.items():
    answered = [s for s in scores if s is not None]
    mean = sum(answered) / len(answered) if answered else 0.0
    result[kind] = {metric: mean, "items": len(answered), "asked": len(scores)}
  return result
