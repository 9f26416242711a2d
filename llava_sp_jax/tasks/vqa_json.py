"""A user's own questions, in a file of JSON or JSON lines, scored by a rule of a table."""

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

LETTERS = "ABCDE"  # the letters that MMBench's rule reads


@dataclasses.dataclass(frozen=True)
class MatchRule:
  """Defines a rule that compares an answer with the ground truths of a row."""

  says: str  # a description for users, part of the results
  score: Callable[[str, Sequence[str]], float]  # (answer, truths) -> [0, 1]
  suffix: str = SHORT  # follows each question
  metric: str = "accuracy"
  least: int = 1  # the fewest truths of a row
  bare: Callable[[str], str] = str  # what is compared of a truth; must not be empty


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
  """Implements a benchmark over a user's file.

  A row has `question` (or `text`), `image` (a file or a list of files; none for text alone),
  `answers` or `answer`, and optionally `id` and `kind`. With the rule `choice` it also has
  `options`, and the answer is one of their letters or texts.
  """

  name = "vqa_json"
  generation: Generation = LONG
  options = ("protocol", "images", "suffix")
  protocols = RULES

  def __init__(
    self, file: str | Path, protocol: str = "exact", images: str = "", suffix: str = "rule"
  ):
    """Reads a file of questions, a JSON list or JSON lines.

    Args:
      file: the path of the file.
      protocol: a name of RULES.
      images: the folder of the images ("": the folder of `file`).
      suffix: a text that follows each question ("rule": the text of the rule).

    Raises: ConfigError for an unknown rule; FileNotFoundError when there is no such file;
      BenchmarkError when none of the rows can be scored.
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
    """Returns the item of a row.

    A row that is not valid becomes an item with a problem, which is asked as far as possible, and
    not scored.
    """
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
    """Returns the ground truths of a row. Raises: ValueError for some that the rule cannot use."""
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
    """Returns the questions of the file, one for each row."""
    return self._items

  def data_hash(self) -> str:
    """Returns a hash, 16 hexadecimal digits, of the file of questions."""
    return file_hash(self._file)

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    """Returns the score of an answer by the rule, from 0 to 1, and for `choice` its option."""
    if not self._choice:
      return {"score": self._rule.score(text, item.truth)}
    chosen = scoring.choice(text, item.extra["options"])
    return {"score": self._rule.score(chosen, item.truth), "chosen": chosen}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns the mean score by the rule, overall and by kind."""
    metric = self._rule.metric
    by_kind = mean_by_kind(items, predictions, self.verdict, metric)
    return Scores(by_kind["all"][metric], metric, by_kind)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """Writes nothing: all is scored here."""
    return []


def _no_object(row: Any) -> str:
  return str(row) if isinstance(row, LineError) else f"expected an object, found {row!r:.40}"


def _question(row: dict[str, Any]) -> str:
  """Returns the question of a row. Raises: ValueError when there is none."""
  question: Any = row.get("question", row.get("text"))
  if not files.is_text(question):
    raise ValueError(f"expected a question, found {question!r:.40}")
  return question


def _name(row: dict[str, Any], number: int) -> str:
  """Returns the id of a row, or its number if it has no id or one that is not a name."""
  name = row.get("id", row.get("question_id"))
  return str(number if name is None or isinstance(name, bool | list | dict | float) else name)


def _list(value: Any, key: str) -> list[str]:
  """Returns a text or number, or a list of them, as a list of texts; an empty one for None.

  Raises: ValueError for anything else.
  """
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
  """Returns {letter: text}. Raises: ValueError for fewer than two options, or more than LETTERS."""
  found = _list(row.get("options", row.get("choices")), "options")
  if not 2 <= len(found) <= len(LETTERS):
    raise ValueError(f"expected 2 to {len(LETTERS)} options, found {len(found)}")
  return dict(zip(LETTERS, found, strict=False))


def _option(answer: str, options: dict[str, str]) -> str:
  """Returns the letter of a ground truth that is a letter or the text of an option.

  Raises: ValueError when it is not exactly one of the options.
  """
  letters = [letter for letter, text in options.items() if answer in (letter, text)]
  if len(letters) != 1:
    raise ValueError(f"expected an answer that is one of the options, found {answer!r:.40}")
  return letters[0]
