"""Provides what is common to the tasks that read LLaVA's evaluation folders."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp_jax.config import lookup
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.tasks import files
from llava_sp_jax.tasks.task import Item, Predictions, Scores, file_hash, mean_by_kind, text_of

SOURCE = "see docs/Evaluation.md of haotian-liu/LLaVA for where it comes from"
SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."

LOADER = Generation(max_new_tokens=128)  # llava/eval/model_vqa_loader.py with --temperature 0
LONG = Generation(max_new_tokens=1024)  # model_vqa.py, model_vqa_science.py, model_vqa_mmbench.py
LMMS_SHORT = Generation(max_new_tokens=16)  # most of lmms-eval's YAML files
LMMS_LONG = Generation(max_new_tokens=128, stop=("ASSISTANT:",))  # its files without a limit


@dataclasses.dataclass(frozen=True)
class Rules:
  """Defines one protocol of a benchmark: what is asked, and how an answer is read."""

  says: str  # a description for users, part of the results
  generation: Generation
  read: Callable[[str], str] = str  # answer -> what is compared with the truth
  prompt: Callable[..., str] | None = None  # row -> question; None: the question of the file


class Benchmark:
  """Implements a task over the files of a benchmark's folder.

  A subclass names its files and protocols, and makes the items. It overrides `score` unless its
  score is the mean of `verdict(...)["score"]` over the answered items.
  """

  name: ClassVar[str]
  homes: ClassVar[Sequence[str]]  # folders below the root that LLaVA's pages and scripts name
  needed: Sequence[str]  # files that must exist
  protocols: ClassVar[dict[str, Rules]]
  options: ClassVar[Sequence[str]] = ("protocol",)  # arguments of the constructor after the folder

  def __init__(self, folder: str | Path, protocol: str = "llava"):
    """Finds the files of the benchmark.

    `folder` is the benchmark's own folder, or a root that contains one of `homes`; of several
    candidates, the one with the most files of `needed` is used.

    Raises: ConfigError for an unknown protocol; FileNotFoundError that lists all missing files.
    """
    given = Path(folder)
    homes = [given / home for home in self.homes if (given / home).is_dir()]
    self.folder = max([*homes, given], key=lambda home: len(files.there(home, self.needed)))
    self.rules = lookup(f"{self.name} protocol", protocol, self.protocols)
    self.protocol = f"{protocol}: {self.rules.says}"
    self.variant = {"protocol": protocol}  # option -> value that distinguishes two scores
    self.generation = self.rules.generation
    self.lmms = protocol.startswith("lmms")
    files.need(self.folder, self.needed, SOURCE)

  def check_submission(self) -> None:
    """Checks, before any question is answered, that `submission` can write its files.

    Raises: ModuleNotFoundError for a package that is missing.
    """

  def items(self) -> list[Item]:
    """Returns the questions.

    Raises: BenchmarkError for files that are not what is expected.
    """
    raise NotImplementedError

  def hashed(self) -> list[Path]:
    """Returns the files that determine the questions.

    Files of ground truths that may be added later are not among them, so that answers stay valid
    then.
    """
    return [self.folder / name for name in self.needed]

  def data_hash(self) -> str:
    """Returns a hash, 16 hexadecimal digits, of the files that determine the questions."""
    hashes = "".join(file_hash(path) for path in self.hashed())
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    """Returns what can be said of one answer, with `score` from 0 to 1; here nothing, {}."""
    return {}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns the mean score of the answered items, as accuracy, overall and by kind."""
    by_kind = mean_by_kind(items, predictions, self.verdict)
    return Scores(by_kind["all"]["accuracy"], "accuracy", by_kind)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """Writes the files for an official server to `folder` and returns their paths; here none."""
    return []

  def rows(self, name: str, keys: Sequence[str] = ("question_id", "image", "text")) -> list[Any]:
    """Reads the questions of one of LLaVA's JSON-lines files, `name` in the benchmark's folder.

    Raises: BenchmarkError for a row that lacks one of `keys`.
    """
    return files.read_lines(self.folder / name, keys)

  def question(self, row: dict[str, Any]) -> str:
    """Returns the question of a row of the file, in the words of the protocol."""
    return self.rules.prompt(row) if self.rules.prompt else row["text"]


def unique(items: list[Item], path: Path) -> list[Item]:
  """Checks that no two items have the same id, and returns them; `path` is for the message.

  Raises: BenchmarkError for an id that appears more than once.
  """
  seen: dict[str, int] = {}
  for item in items:
    seen[item.id] = seen.get(item.id, 0) + 1
  if twice := [key for key, count in seen.items() if count > 1]:
    raise files.BenchmarkError(
      f"{path}: {len(twice)} ids appear more than once, {', '.join(twice[: files.SHOWN])}; "
      "expected each question once. Fetch the file again."
    )
  return items


def settled(items: list[Item], path: Path) -> list[Item]:
  """Checks items and returns them unchanged; `path`, the file they come from, is for the message.

  Raises: BenchmarkError when there are none, none can be scored, or two have the same id.
  """
  if not items:
    raise files.BenchmarkError(f"{path}: no questions; expected one at least")
  bad = [f"{item.id}: {item.problem}" for item in items if item.problem]
  if bad and len(bad) == len(items):
    files.refuse(path, bad, "questions that can be scored")
  return unique(items, path)


def numbered(rows: list[dict[str, Any]]) -> list[str]:
  """Returns a unique id for each row, whose `question_id` is the name of its image.

  The id adds the number of the question about that image: `im#1`, `im#2`, ...
  """
  counts: dict[str, int] = {}
  result = []
  for row in rows:
    key = str(row["question_id"])
    counts[key] = counts.get(key, 0) + 1
    result.append(f"{key}#{counts[key]}")
  return result


def served(items: list[Item], predictions: Predictions, where: str) -> Scores:
  """Returns Scores without a headline, for a benchmark that a server scores.

  They have the numbers of answered and of asked questions by kind. `where` names the server.
  """
  by_kind = mean_by_kind(items, predictions, lambda item, text: {"score": 0.0}, "unknown")
  counts = {k: {"items": v["items"], "asked": v["asked"]} for k, v in by_kind.items()}
  return Scores(None, f"scored by {where}", counts)


def judged(
  headline: float,
  metric: str,
  by_kind: dict[str, dict[str, float]],
  figures: dict[str, Any],
  verdicts: dict[str, dict[str, Any]],
) -> Scores:
  """Returns Scores over the answers that a judge could grade; without any, the headline is None.

  Args:
    headline: the benchmark's figure.
    metric: what it measures.
    by_kind: figures by kind, `items` counts the graded answers.
    figures: other results; `unjudged` counts the answers that the judge failed to grade.
    verdicts: the judge's results by item id.
  """
  if by_kind["all"]["items"]:
    return Scores(headline, metric, by_kind, figures, verdicts)
  failed = f"the judge failed for all of {figures['unjudged']} answers"
  why = failed if figures["unjudged"] else "there is no answer"
  return Scores(None, f"no score: {why}", by_kind, figures, verdicts)


def texts(items: list[Item], predictions: Predictions) -> list[tuple[Item, str]]:
  """Returns every item with its answer, or with "" if it has none, in the order of the items.

  Needed by official scorers that match answers to questions by position, or refuse a file without
  an answer to each question.
  """
  return [(item, text_of(predictions, item) or "") for item in items]


def answered(items: list[Item], predictions: Predictions) -> list[tuple[Item, str]]:
  """Returns the items that have an answer and can be scored, with their answers."""
  pairs = [(item, text_of(predictions, item)) for item in items if not item.problem]
  return [(item, text) for item, text in pairs if text is not None]


def ratio(part: float, whole: float) -> float:
  """Returns part / whole; 0.0 if `whole` is 0 (the originals raise ZeroDivisionError)."""
  return part / whole if whole else 0.0
