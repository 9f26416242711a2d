"""Questions of your own, in a file of JSON or JSON lines, scored by a rule that is chosen by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_sp_jax.config import lookup
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.jsonl import LineError
from llava_sp_jax.tasks import files, scoring
from llava_sp_jax.tasks.benchmark import LETTER, LONG, SHORT, settled
from llava_sp_jax.tasks.task import Item, Predictions, Scores, file_hash, mean_by_kind

LETTERS = "ABCDE"  # that MMBench's rule reads


@dataclasses.dataclass(frozen=True)
class MatchRule:
  """`score` compares a text with the answers of a row, in [0, 1]; `suffix` ends each question."""

  says: str
  score: Callable[[str, Sequence[str]], float]
  suffix: str = SHORT
  metric: str = "accuracy"
  least: int = 1  # answers of a row
  bare: Callable[[str], str] = str  # what of an answer is compared: without any, all would be equal


def _any(equal: Callable[[str, str], bool]) -> Callable[[str, Sequence[str]], float]:
  return lambda text, answers: float(any(equal(text.strip(), answer) for answer in answers))


def _contains(text: str, answer: str) -> bool:
  return scoring.vqa_normal(answer) in scoring.vqa_normal(text)


RULES = {
  "exact": MatchRule("equal to an answer without case and punctuation", _any(scoring.plain_match),
                bare=scoring.plain),
  "contains": MatchRule("an answer stands in the text, both normalised as for VQA", _any(_contains), "",
                   bare=scoring.vqa_normal),
  "vqa": MatchRule("VQA's soft accuracy over the humans' answers", scoring.vqa_accuracy,
              least=scoring.HUMANS),
  "relaxed": MatchRule("ChartQA's relaxed accuracy: numbers within 5%", _any(scoring.relaxed_match)),
  "anls": MatchRule("DocVQA's normalised Levenshtein similarity", scoring.anls, metric="anls"),
  "choice": MatchRule("the option that the text names, by MMBench's rules", _any(str.__eq__), LETTER),
}  # fmt: skip


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

    Raises: ConfigError for an unknown rule; FileNotFoundError; BenchmarkError when none of the rows
      can be scored.
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
    return settled([self._item(i, row) for i, row in files.read_rows(self._file)], self._file)

  def _item(self, number: int, row: Any) -> Item:
    """What is not understood of a row is its `problem`: it is asked as far as it goes, and left out
    of the scores."""
    asked, problem = "", "" if isinstance(row, dict) else _no_object(row)
    row = row if isinstance(row, dict) else {}
    names: list[str] = []
    answers: list[str] = []
    options: dict[str, str] = {}
    try:
      if not problem:
        asked = _question(row)
        names = _list(row.get("image", row.get("images")), "image")
        options = _options(row) if self._choice else {}
        answers = self._answers(row, options)
    except ValueError as error:
      problem = str(error)
    lines = [asked, *(f"{letter}. {text}" for letter, text in options.items())]
    return Item(
      id=_name(row, number),
      question="\n".join(filter(None, [*lines, self._suffix])),
      images=tuple(self._images / name for name in names),
      kind=str(row.get("kind", row.get("category", "default"))),
      truth=answers,
      extra={"options": options} if options else {},
      problem=problem,
    )

  def _answers(self, row: dict[str, Any], options: dict[str, str]) -> list[str]:
    """Raises: ValueError for what the rule cannot compare with."""
    given = _list(row.get("answers", row.get("answer")), "answers")
    found = given if options else [answer.strip() for answer in given]
    if len(found) < self._rule.least:
      raise ValueError(f"expected at least {self._rule.least} answers, found {len(found)}")
    if options:
      return [_option(answer, options) for answer in found]
    if nothing := [answer for answer in found if not self._rule.bare(answer)]:
      raise ValueError(f"nothing is left of the answer {nothing[0]!r:.40} when it is compared")
    return found

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


def _no_object(row: Any) -> str:
  return str(row) if isinstance(row, LineError) else f"expected an object, found {row!r:.40}"


def _question(row: dict[str, Any]) -> str:
  """Raises: ValueError where there is none."""
  question: Any = row.get("question", row.get("text"))
  if not files.is_text(question):
    raise ValueError(f"expected a question, found {question!r:.40}")
  return question


def _name(row: dict[str, Any], number: int) -> str:
  """The id of a row, or its number where it has none that is a name."""
  name = row.get("id", row.get("question_id"))
  return str(number if name is None or isinstance(name, bool | list | dict | float) else name)


def _list(value: Any, key: str) -> list[str]:
  """One text or number, or a list of them, as texts; none is an empty list. Raises: ValueError."""
  values = [] if value is None else value if isinstance(value, list) else [value]
  texts = [
    files.of_number(one) if isinstance(one, int | float) else one if files.is_text(one) else None
    for one in values
  ]
  for one, text in zip(values, texts, strict=True):
    if text is None:
      raise ValueError(f"expected texts under {key}, found {one!r:.40}")
  return [text for text in texts if text is not None]


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
