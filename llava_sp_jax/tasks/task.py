"""What a benchmark is: items with a question, images and a truth, and rules from text to scores."""

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
  """An evaluation that cannot go on; the message says what was found and what to do."""


@dataclasses.dataclass(frozen=True)
class Item:
  """One question. An image is a file's path, or an encoded file's bytes; `id` is unique in a task."""

  id: str
  question: str
  images: tuple[Path | bytes, ...]
  kind: str  # category for the report
  truth: Any  # JSON-able; None where only a server knows
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # what a task's own rules need
  problem: str = ""  # why no answer to it can be scored: its truth, or its options, say nothing


@dataclasses.dataclass(frozen=True)
class Prediction:
  """A model's answer; with `error`, why there is none."""

  id: str
  text: str
  error: str = ""


@dataclasses.dataclass(frozen=True)
class Scores:
  """What a task makes of all predictions; JSON-able.

  `by_kind` maps "all" and each kind to figures in [0, 1] or points, always with `items` (how many
  the figures were taken over) and `asked` (how many there are). `figures` holds what the protocol
  reports beside them (`unjudged`: answers that a judge could not score). `headline` is None where a
  server scores, and where nothing could be scored. `verdicts` holds, by the item's id,
  what was said of single answers on the way (by a judge), over what `Task.verdict` says.
  """

  headline: float | None
  metric: str  # what the headline is; without one, why there is none
  by_kind: dict[str, dict[str, float]]
  figures: dict[str, Any] = dataclasses.field(default_factory=dict)
  verdicts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


Predictions = Mapping[str, Prediction]  # by the item's id


class Task(Protocol):
  """One benchmark; each is one file in `eval/tasks/`."""

  name: str
  protocol: str  # the exact rule, by name
  generation: Generation  # what the protocol asks for

  def items(self) -> list[Item]: ...
  def data_hash(self) -> str: ...

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    """What can be said of one answer: `score` in [0, 1] where there is one, {} where a server, a
    judge or the whole set decides."""
    ...

  def score(self, items: list[Item], predictions: Predictions) -> Scores: ...

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """Writes the files that the official server or scorer takes; [] when all is scored here."""
    ...


def file_hash(path: Path) -> str:
  """sha256 of a regular file, shortened. Raises: FormatError, so nothing waits for a pipe."""
  file: Any = regular.open_regular(path)
  with file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def text_of(predictions: Predictions, item: Item) -> str | None:
  """The answer to an item, or None where there is none (not asked, or it failed)."""
  found = predictions.get(item.id)
  return None if found is None or found.error else found.text


def mean_by_kind(
  items: Iterable[Item],
  predictions: Predictions,
  verdict: Callable[[Item, str], dict[str, Any]],
  metric: str = "accuracy",
  missing: float | None = None,
) -> dict[str, dict[str, float]]:
  """{kind: {metric, items, asked}}, "all" first: means of `score` over the answered items.

  An item with a `problem` is asked and never scored. With `missing`, an item without an answer scores that and counts among `items`, as some originals
  have it. A kind of which nothing was answered has the metric 0.0 over 0 items.
  """
  groups: dict[str, list[float | None]] = {"all": []}
  for item in items:
    text = text_of(predictions, item)
    score = None
    if not item.problem:
      score = missing if text is None else float(verdict(item, text)["score"])
    groups["all"].append(score)
    if item.kind != "all":  # a kind of that name would count twice
      groups.setdefault(item.kind, []).append(score)
  result = {}
  for kind, scores in groups.items():
    answered = [s for s in scores if s is not None]
    mean = sum(answered) / len(answered) if answered else 0.0
    result[kind] = {metric: mean, "items": len(answered), "asked": len(scores)}
  return result
