"""What the tasks that read LLaVA's evaluation folders have in common."""

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
LMMS_LONG = Generation(max_new_tokens=128, stop=("ASSISTANT:",))  # its files that limit no tokens


@dataclasses.dataclass(frozen=True)
class Rules:
  """One named protocol of a benchmark: what it asks and how it reads the answer."""

  says: str
  generation: Generation
  read: Callable[[str], str] = str  # text -> what is compared with the truth
  prompt: Callable[..., str] | None = None  # row -> question, where it is not the file's own


class Benchmark:
  """A task over the files of `<root>/<home>`; `folder` is that folder, or the root above it. Of
  several, it is the one that holds most of the needed files.

  A subclass names its files and protocols and makes the items; what it does not score by the mean
  of `verdict(...)["score"]` over the answered items, it overrides.
  """

  name: ClassVar[str]
  homes: ClassVar[Sequence[str]]  # below playground/data/eval; LLaVA's pages and scripts may differ
  needed: Sequence[str]  # files that must be there
  protocols: ClassVar[dict[str, Rules]]
  options: ClassVar[Sequence[str]] = ("protocol",)  # what the constructor takes beside the folder

  def __init__(self, folder: str | Path, protocol: str = "llava"):
    """Raises: ConfigError for an unknown protocol; FileNotFoundError with all missing files."""
    given = Path(folder)
    homes = [given / home for home in self.homes if (given / home).is_dir()]
    self.folder = max([*homes, given], key=lambda home: len(files.there(home, self.needed)))
    self.rules = lookup(f"{self.name} protocol", protocol, self.protocols)
    self.protocol = f"{protocol}: {self.rules.says}"
    self.variant = {"protocol": protocol}  # what scores of one benchmark may differ in, by name
    self.generation = self.rules.generation
    self.lmms = protocol.startswith("lmms")
    files.need(self.folder, self.needed, SOURCE)

  def check_submission(self) -> None:
    """Raises: ModuleNotFoundError for what `submission` will need, before anything is answered."""

  def items(self) -> list[Item]:
    raise NotImplementedError

  def hashed(self) -> list[Path]:
    """The files that decide what is asked. Those of truths that may come later are not among them:
    answers stay good when they come."""
    return [self.folder / name for name in self.needed]

  def data_hash(self) -> str:
    hashes = "".join(file_hash(path) for path in self.hashed())
    return hashlib.sha256(hashes.encode()).hexdigest()[:16]

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    return {}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    by_kind = mean_by_kind(items, predictions, self.verdict)
    return Scores(by_kind["all"]["accuracy"], "accuracy", by_kind)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    return []

  def rows(self, name: str, keys: Sequence[str] = ("question_id", "image", "text")) -> list[Any]:
    """The questions of one of LLaVA's JSON-lines files."""
    return files.read_lines(self.folder / name, keys)

  def question(self, row: dict[str, Any]) -> str:
    return self.rules.prompt(row) if self.rules.prompt else row["text"]


def unique(items: list[Item], path: Path) -> list[Item]:
  """The items. Raises: BenchmarkError when two have the same id."""
  seen: dict[str, int] = {}
  for item in items:
    seen[item.id] = seen.get(item.id, 0) + 1
  if twice := [key for key, count in seen.items() if count > 1]:
    raise files.BenchmarkError(
      f"{path}: {len(twice)} ids stand more than once, {', '.join(twice[: files.SHOWN])}; "
      "expected each question once. Fetch the file again."
    )
  return items


def settled(items: list[Item], path: Path) -> list[Item]:
  """The items, each once. Raises: BenchmarkError for none at all, or none that can be scored."""
  if not items:
    raise files.BenchmarkError(f"{path}: no questions; expected one at least")
  bad = [f"{item.id}: {item.problem}" for item in items if item.problem]
  if bad and len(bad) == len(items):
    files.refuse(path, bad, "questions that can be scored")
  return unique(items, path)


def numbered(rows: list[dict[str, Any]]) -> list[str]:
  """Ids for rows whose `question_id` names an image: `im#1`, `im#2`, ... in their order."""
  counts: dict[str, int] = {}
  result = []
  for row in rows:
    key = str(row["question_id"])
    counts[key] = counts.get(key, 0) + 1
    result.append(f"{key}#{counts[key]}")
  return result


def served(items: list[Item], predictions: Predictions, where: str) -> Scores:
  """Scores of a benchmark that a server scores: only how many were answered."""
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
  """Scores over what could be judged; where that is nothing, there is no headline."""
  if by_kind["all"]["items"]:
    return Scores(headline, metric, by_kind, figures, verdicts)
  failed = f"the judge failed for all of {figures['unjudged']} answers"
  why = failed if figures["unjudged"] else "there is no answer"
  return Scores(None, f"no score: {why}", by_kind, figures, verdicts)


def texts(items: list[Item], predictions: Predictions) -> list[tuple[Item, str]]:
  """Every item with its answer, "" where there is none: for scorers that pair lines by their place
  or refuse a file that misses a question."""
  return [(item, text_of(predictions, item) or "") for item in items]


def answered(items: list[Item], predictions: Predictions) -> list[tuple[Item, str]]:
  """The items that have an answer and can be scored, with it."""
  pairs = [(item, text_of(predictions, item)) for item in items if not item.problem]
  return [(item, text) for item, text in pairs if text is not None]


def ratio(part: float, whole: float) -> float:
  """0.0 where there is nothing to divide by (the originals raise ZeroDivisionError)."""
  return part / whole if whole else 0.0
