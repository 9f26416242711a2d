"""MMBench (scripts/v1_5/eval/mmbench.sh): multiple choice; its server scores the submission.

MMBench's own rule ("circular") counts a question as right only if it is answered correctly in every
order of its options. LLaVA asks one order unless `--all-rounds` is given; here `circular=True` asks
all.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.tasks import files, sheet
from llava_sp_jax.tasks.benchmark import LETTER, LONG, Benchmark, Rules, judged, served, settled
from llava_sp_jax.tasks.choices import circular_score, empty, of_llava, of_lmms
from llava_sp_jax.tasks.judge import Judge, Reviews
from llava_sp_jax.tasks.scoring import choice
from llava_sp_jax.tasks.task import Item, Predictions, Scores, text_of

SERVER = "https://mmbench.opencompass.org.cn"
LETTERS = "ABCDE"
DIGITS = 18  # the most digits of an index
COLUMNS = ("index", "question", "hint", "A", "B", "C", "D", "image")
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")


class MmBench(Benchmark):
  """Implements MMBench.

  Reads the questions from a tab-separated file. Its images are in base64; a row may name the index
  of another row in place of its image.
  """

  name = "mmbench"
  homes: ClassVar[Sequence[str]] = ("mmbench",)
  split = "mmbench_dev_20230712"
  needed: Sequence[str] = ()  # the split's file
  options = ("protocol", "split", "circular", "judge", "reviews")
  protocols: ClassVar = {
    "llava": Rules("the server scores", LONG, prompt=of_llava(LETTER)),
    "lmms": Rules(
      "MMBench's rules for letters and texts, then the judge",
      Generation(max_new_tokens=1024, stop=("ASSISTANT:",)),
      prompt=of_lmms("There are several options:", LETTER),
    ),
  }

  def __init__(
    self,
    folder: str | Path,
    protocol: str = "llava",
    split: str = "",
    circular: bool = False,
    judge: Judge | None = None,
    reviews: str | Path | None = None,
  ):
    """Finds the TSV file of the split.

    Args:
      folder: the folder of the benchmark, or a root above it.
      protocol: a name of `protocols`.
      split: the name of the TSV file without its ending ("": that of the class).
      circular: asks each question in all orders of its options.
      judge: reads answers that the rules cannot read; protocol `lmms` only.
      reviews: a file that caches the judge's replies (None: none).
    """
    self.split = split or self.split
    self.needed = (f"{self.split}.tsv",)
    super().__init__(folder, protocol)
    self._judge = Reviews(judge, reviews) if judge and self.lmms else None
    self.protocol += f"; {self.split}" + ("; circular" if circular else "")
    self.protocol += f"; judge {self._judge.name}" if self._judge else "; no judge"
    self.variant["split"] = self.split
    self._circular, self._answers = circular, False

  def items(self) -> list[Item]:
    """Returns the questions, each in one order of its options or (`circular`) in all of them."""
    path = self.folder / self.needed[0]
    rows = files.read_tsv(path, COLUMNS)
    images = {row["index"]: row["image"] for row in rows}
    # Some splits have no answers; only the server knows them.
    self._answers = any(not empty(row.get("answer", "")) for row in rows)
    problems = [self._problem(row) for row in rows]
    groups = [_group(row["index"]) for row in rows]
    by_group = {group: problem for group, problem in zip(groups, problems, strict=True) if problem}
    items = []
    for number, (row, group) in enumerate(zip(rows, groups, strict=True), 1):
      image = _picture(row["image"], images)
      texts = self._texts(row)
      letters = LETTERS[: len(texts)]
      answer = row.get("answer", "")
      place = letters.index(answer) if self._answers and answer in list(letters) else -1
      kept = {k: v for k, v in row.items() if k not in DROPPED}
      name = row["index"].strip() or f"row {number}"
      for turn in range(max(1, len(texts)) if self._circular else 1):
        options = dict(zip(letters, texts[turn:] + texts[:turn], strict=True))
        truth = None if place < 0 else letters[(place - turn) % len(letters)]
        items.append(
          Item(
            id=f"{name}/{turn}" if turn else name,
            question=(self.rules.prompt or of_llava(LETTER))(row, options),
            images=(image,),
            kind=row.get("category") or "default",
            truth=truth,
            extra={
              "group": group,
              "round": turn,
              "options": options,
              "asked": row["question"],
              "row": kept,
            },
            problem=problems[number - 1] or by_group.get(group, ""),
          )
        )
    return settled(items, path)

  def _texts(self, row: dict[str, str]) -> list[str]:
    """Returns the options up to the first empty cell, as LLaVA and lmms-eval do."""
    texts = (row[letter] for letter in self._columns(row))
    return list(itertools.takewhile(lambda text: not empty(text), texts))

  def _columns(self, row: dict[str, str]) -> str:
    return LETTERS if self.lmms and "E" in row else LETTERS[:4]

  def _problem(self, row: dict[str, str]) -> str:
    """Returns why an answer to this row cannot be scored; "" if it can."""
    if not _is_index(row["index"]):
      return f"the index {row['index']!r:.40} is no whole number"
    texts, columns = self._texts(row), self._columns(row)
    if len(texts) < 2:
      return f"{len(texts)} options; expected two at least, from A on"
    if gap := [letter for letter in columns[len(texts) :] if not empty(row[letter])]:
      return f"option {gap[0]} stands behind an empty one, {columns[len(texts)]}"
    answer = row.get("answer", "")
    if self._answers and answer not in list(columns[: len(texts)]):
      options = ", ".join(columns[: len(texts)])
      return f"the answer {answer!r:.40} is none of the options {options}"
    return ""

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    """Returns in `read` the letter of the option that MMBench's rules find in an answer, or "".

    Adds a `score`, 1 or 0, unless the ground truth is unknown or the judge has to read the answer.
    """
    read = choice(text, item.extra["options"])
    if item.truth is None or item.problem or (self._judge and not read):
      return {"read": read}
    return {"score": float(read == item.truth), "read": read}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns the share of questions that are right in all their orders (protocol `lmms`).

    With protocol `llava` only the server scores; if the file has answers, the share by the rules
    alone is the figure `local`.
    """
    if not items or all(item.truth is None for item in items):
      return served(items, predictions, SERVER)
    local = circular_score(items, predictions, self.verdict, self._judge)
    if self.lmms:
      share = local.by_kind["all"]["accuracy"]
      return judged(share, "accuracy", local.by_kind, local.figures, local.verdicts)
    counts = served(items, predictions, SERVER)
    return Scores(None, counts.metric, counts.by_kind, {"local": local.by_kind, **local.figures})

  def check_submission(self) -> None:
    """Checks that Excel files can be written. Raises: ModuleNotFoundError without openpyxl."""
    sheet.need(f"{self.split}.xlsx")

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """Writes `<split>.xlsx`, as scripts/convert_mmbench_for_submission.py does.

    It has the columns of the TSV without those of DROPPED, and `prediction` after the options. Only
    answers to the first order of options are submitted (the original, given all rounds, submits the
    last one, whose letters stand for other options).
    """
    first = [item for item in items if not item.extra["round"]]
    texts = {item.id: text_of(predictions, item) for item in first}
    table: list[list[Any]] = []
    for item in first:
      row = item.extra["row"]
      values = [_cell(key, value) for key, value in row.items()]
      table.append([*values[:6], texts.get(item.id), *values[6:]])
    names = list(first[0].extra["row"]) if first else []
    header = [*names[:6], "prediction", *names[6:]]
    return [sheet.write(folder / f"{self.split}.xlsx", header, table)]


def _is_index(text: str) -> bool:
  return text.isdecimal() and len(text) <= DIGITS


def _group(index: str) -> int | str:
  """Returns the group of a row: the orders of one question have indices that differ by 1,000,000.

  An index that is not a number is a group of its own.
  """
  return int(index) % 1_000_000 if _is_index(index) else index


def _picture(text: str, images: Mapping[str, str]) -> bytes:
  """Returns the encoded image of a cell, or of the row whose index the cell holds.

  Returns empty bytes for any other text, which the engine reports as an unreadable image.
  """
  seen = set()
  while text in images and text not in seen:
    seen.add(text)
    text = images[text]
  if _is_index(text):  # of a row that does not exist, or of a cycle of rows
    return b""
  try:
    return base64.b64decode(text, validate=True)
  except ValueError:
    return b""


def _cell(key: str, value: str) -> int | str | None:
  """Converts a cell of the TSV to a cell of the sheet."""
  if key == "index" and _is_index(value):
    return int(value)
  return None if empty(value) else value
