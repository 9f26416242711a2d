"""Questions of your own, in a file of JSON or JSON lines, scored by a rule that is chosen by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_sp_jax.config import lookup
from llava_sp_jax.eval import files, scoring
from llava_sp_jax.eval.benchmark import LETTER, LONG, SHORT, settled
from llava_sp_jax.eval.task import Item, Predictions, Scores, file_hash, mean_by_kind
from llava_sp_jax.infer.generation import Generation

HUMANS = 4  # answers that VQA's soft accuracy takes at least: with fewer no answer reaches 1
LETTERS = "ABCDE"  # that MMBench's rule reads


@dataclasses.dataclass(frozen=True)
class Rule:
  """`score` compares a text with the answers of a row, in [0, 1]; `suffix` ends each question."""

  says: str
  score: Callable[[str, Sequence[str]], float]
  suffix: str = SHORT
  metric: str = "accuracy"
  least: int = 1  # answers of a row


def _any(equal: Callable[[str, str], bool]) -> Callable[[str, Sequence[str]], float]:
  return lambda text, answers: float(any(equal(text.strip(), answer) for answer in answers))


def _contains(text: str, answer: str) -> bool:
  return scoring.vqa_normal(answer) in scoring.vqa_normal(text)


RULES = {
  "exact": Rule("equal to an answer without case and punctuation", _any(scoring.plain_match)),
  "contains": Rule("an answer stands in the text, both normalised as for VQA", _any(_contains), ""),
  "vqa": Rule("VQA's soft accuracy over the humans' answers", scoring.vqa_accuracy, least=HUMANS),
  "relaxed": Rule("ChartQA's relaxed accuracy: numbers within 5%", _any(scoring.relaxed_match)),
  "anls": Rule("DocVQA's normalised Levenshtein similarity", scoring.anls, metric="anls"),
  "choice": Rule("the option that the text names, by MMBench's rules", _any(str.__eq__), LETTER),
}


class VqaJson:
  """A row: `question` (or `text`); `image`, one file or a list of them, none for text alone; `answers`
  or `answer`; maybe `id` and `kind`. Under `choice` also `options`, and the answer is one of
  their letters or texts.
  """

  name = "vqa_json"
  generation: Generation = LONG
  options = ("protocol", "images", "suffix")
  protocols = RULES

  def __init__(
    self, file: str | Path, protocol: str = "exact", images: str = "", suffix: str = "rule"
  ):
    """Reads the rows.

    Args:
      file: rows in a JSON list, or one in each line.
      protocol: a name of RULES.
      images: folder that the images' names start from; that of `file` if empty.
      suffix: what is put below each question; "rule" for what the rule asks.

    Raises: ConfigError for an unknown rule; FileNotFoundError; BenchmarkError that tells the rows
      that cannot be asked, or that none can be scored.
    """
    self._file = Path(file)
    self._rule = lookup(f"{self.name} protocol", protocol, RULES)
    if not self._file.is_file():
      raise FileNotFoundError(
        f"{file}: no such file; expected a JSON list or JSON lines with question, image, answers"
      )
    self.protocol = f"{protocol}: {self._rule.says}"
    self.variant = {"protocol": protocol}
    self._choice = protocol == "choice"
    self._images = Path(images) if images else self._file.parent
    self._suffix = self._rule.suffix if suffix == "rule" else suffix
    if suffix != "rule":
      self.protocol += f"; asked with {suffix!r} below"
    self._items = self._read()

  def _read(self) -> list[Item]:
    items, problems = [], []
    for number, row in files.read_rows(self._file):
      try:
        items.append(self._item(number, row))
      except (ValueError, KeyError, TypeError) as error:
        problems.append(f"row {number}: {error.args[0]}")
    files.refuse(self._file, problems, "rows with a question, and images by their names")
    return settled(items, self._file)

  def _item(self, number: int, row: Any) -> Item:
    """Raises: ValueError that says why the row cannot be asked. One that can, but whose answers are
    not understood, is asked and left out of the scores."""
    if not isinstance(row, dict):
      raise ValueError(f"expected an object, found {row!r:.40}")
    question = row.get("question", row.get("text"))
    if not isinstance(question, str) or not question.strip():
      raise ValueError(f"expected a question, found {question!r:.40}")
    names = _list(row.get("image", row.get("images")), "image")
    options = _options(row) if self._choice else {}
    answers, problem = [], ""
    try:
      answers = self._answers(row, options)
    except ValueError as error:
      problem = str(error)
    lines = [question, *(f"{letter}. {text}" for letter, text in options.items())]
    return Item(
      id=str(row.get("id", row.get("question_id", number))),
      question="\n".join(filter(None, [*lines, self._suffix])),
      images=tuple(self._images / name for name in names),
      kind=str(row.get("kind", row.get("category", "default"))),
      truth=answers,
      extra={"options": options} if options else {},
      problem=problem,
    )

  def _answers(self, row: dict[str, Any], options: dict[str, str]) -> list[str]:
    """Raises: ValueError for what the rule cannot compare with."""
    found = _list(row.get("answers", row.get("answer")), "answers")
    if len(found) < self._rule.least:
      raise ValueError(f"expected at least {self._rule.least} answers, found {len(found)}")
    return [_option(answer, options) for answer in found] if options else found

  def items(self) -> list[Item]:
    return self._items

  def data_hash(self) -> str:
    return file_hash(self._file)

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    if not self._choice:
      return {"score": self._rule.score(text, item.truth)}
    chosen = scoring.choice(text, item.extra["options"])
    return {"score": self._rule.score(chosen, item.truth), "chosen": chosen}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    metric = self._rule.metric
    by_kind = mean_by_kind(items, predictions, self.verdict, metric)
    return Scores(by_kind["all"][metric], metric, by_kind)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    return []


def _list(value: Any, key: str) -> list[str]:
  """One text or number, or a list of them, as texts; none is an empty list. Raises: ValueError."""
  values = [] if value is None else value if isinstance(value, list) else [value]
  for one in values:
    if isinstance(one, bool) or not isinstance(one, str | int | float) or one == "":
      raise ValueError(f"expected texts under {key}, found {one!r:.40}")
  return [str(one) for one in values]


def _options(row: dict[str, Any]) -> dict[str, str]:
  """{letter: text}. Raises: ValueError for fewer than two, or more than the rule reads."""
  found = _list(row.get("options", row.get("choices")), "options")
  if not 2 <= len(found) <= len(LETTERS):
    raise ValueError(f"expected 2 to {len(LETTERS)} options, found {len(found)}")
  return dict(zip(LETTERS, found, strict=False))


def _option(answer: str, options: dict[str, str]) -> str:
  """The letter of an answer, which is a letter or an option's text. Raises: ValueError."""
  letters = [letter for letter, text in options.items() if answer in (letter, text)]
  if len(letters) != 1:
    raise ValueError(f"expected an answer that is one of the options, found {answer!r:.40}")
  return letters[0]
