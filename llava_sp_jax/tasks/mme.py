"""MME (scripts/v1_5/eval/mme.sh): two yes-or-no questions an image; accuracy and accuracy+."""

from __future__ import annotations

import collections
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from llava_sp_jax.tasks import files
from llava_sp_jax.tasks.benchmark import (
  LMMS_SHORT,
  LOADER,
  SHORT,
  Benchmark,
  Rules,
  answered,
  numbered,
  ratio,
  settled,
  texts,
)
from llava_sp_jax.tasks.scoring import mme_answer, mme_answer_lmms
from llava_sp_jax.tasks.task import Item, Predictions, Scores

ASKED = "llava_mme.jsonl"
RELEASE = "MME_Benchmark_release_version"
POINTS = 200  # the highest score of a subtask
Line = tuple[str, str, str]  # category, stem of the image's name, question
YES_NO = " Please answer yes or no."
PARTS = {
  "perception": (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
  ),
  "cognition": (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
  ),
}


class Mme(Benchmark):
  """Implements MME.

  Reads the ground truths from the text files of the release, and finds them by image and question
  like LLaVA's convert_answer_to_mme.py.
  """

  name = "mme"
  homes = ("MME",)
  needed = (ASKED, RELEASE)
  protocols: ClassVar = {
    "llava": Rules(
      "yes or no within the first four letters; subtask score = accuracy + accuracy+ "
      "(both questions of an image), in %",
      LOADER,
      mme_answer,
    ),
    "lmms": Rules(
      "as llava; stripped, without periods, y and n count, at most 16 tokens",
      LMMS_SHORT,
      mme_answer_lmms,
      lambda row: row["text"].replace(YES_NO, ""),
    ),
  }

  def _answers(self) -> list[Path]:
    """Returns the text files of questions and answers, beside the images or in their own folder."""
    root = self.folder / RELEASE
    return sorted([*root.glob("*/questions_answers_YN/*.txt"), *root.glob("*/*.txt")])

  def hashed(self) -> list[Path]:
    """Returns the files that determine the questions: LLaVA's list and the release's texts."""
    return [self.folder / ASKED, *self._answers()]

  def _truths(self) -> tuple[dict[Line, str], dict[tuple[str, str], str]]:
    """Returns the answers by Line, and by (category, stem) why those of an image are not valid."""
    truths: dict[Line, str] = {}
    invalid: dict[tuple[str, str], str] = {}
    for path in self._answers():
      place = path.relative_to(self.folder / RELEASE).parts[0], path.stem
      try:
        lines = files.read_text(path).strip().split("\n")
      except ValueError as error:
        invalid[place] = str(error)
        continue
      for line in lines:
        question, tab, answer = line.strip().partition("\t")
        before = truths.setdefault((*place, question), answer)
        if not tab or answer.lower() not in ("yes", "no"):
          problem = f"expected a question, a tab and Yes or No, found {line!r:.80}"
          invalid[place] = f"{path.name}: {problem}"
        elif before.lower() != answer.lower():
          invalid[place] = f"{path.name}: {before} and {answer} to {question!r:.80}"
    return truths, invalid

  def items(self) -> list[Item]:
    """Returns the questions, with the ground truths of the release."""
    truths, invalid = self._truths()
    rows = self.rows(ASKED)
    odd = [
      f"question_id {i!a:.40}"
      for i in (str(row["question_id"]) for row in rows)
      if not i.isprintable()
    ]
    files.refuse(self.folder / ASKED, odd, "question_id such as artwork/1.png, which names files")
    counts = collections.Counter(str(row["question_id"]) for row in rows)
    items = []
    for row, key in zip(rows, numbered(rows), strict=True):
      pair = str(row["question_id"])
      category, stem = pair.split("/")[0], pair.split("/")[-1].split(".")[0]
      plain = row["text"].replace(SHORT, "").strip()
      forms = (plain,) if YES_NO.strip() in plain else (plain + YES_NO, f"{plain} {YES_NO}")
      line = next((form for form in forms if (category, stem, form) in truths), forms[0])
      truth = truths.get((category, stem, line))
      problem = invalid.get((category, stem), "")  # one bad question makes the pair unscorable
      if not problem and truth is None:
        problem = f"no answer to {line!r:.80} in {RELEASE}/{category}"
      if not problem and counts[pair] != 2:
        problem = f"{counts[pair]} questions about this image; expected a pair"
      items.append(
        Item(
          id=key,
          question=self.question(row),
          images=(self.folder / RELEASE / row["image"],),
          kind=category,
          truth=truth or "",
          extra={"pair": pair, "file": f"{stem}.txt", "line": line},
          problem=problem,
        )
      )
    return settled(_whole_pairs(items), self.folder / RELEASE)

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    """Returns score 1 if the answer reads as the ground truth, else 0; `read` is what was read."""
    read = self.rules.read(text)
    return {"score": float(read == item.truth.lower()), "read": read}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns the perception score (at most 2000), the sum of the scores of its subtasks.

    The figures are cognition (at most 800) and the total. The two questions about an image are a
    pair. A pair with a missing answer is not right (the original needs all answers, in order).
    """
    by_kind: dict[str, dict[str, float]] = {}
    for kind in ("all", *sorted({item.kind for item in items})):
      members = [item for item in items if kind in ("all", item.kind)]
      right: dict[str, list[float]] = {}
      for item, text in answered(members, predictions):
        right.setdefault(item.extra["pair"], []).append(self.verdict(item, text)["score"])
      count = sum(map(len, right.values()))
      accuracy = ratio(sum(map(sum, right.values())), count)
      plus = ratio(sum(sum(pair) == 2 for pair in right.values()), len(right))
      by_kind[kind] = {
        "accuracy": accuracy,
        "accuracy_plus": plus,
        "score": 100 * accuracy + 100 * plus,
        "items": count,
        "asked": len(members),
      }
    parts = {
      part: sum(by_kind[kind]["score"] for kind in kinds if kind in by_kind)
      for part, kinds in PARTS.items()
    }
    figures = {**parts, "total": sum(parts.values())}
    most = POINTS * sum(kind in by_kind for kind in PARTS["perception"])  # 2000 for all of them
    return Scores(parts["perception"], f"perception score (of {most})", by_kind, figures)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """Writes `mme/<subtask>.txt` for the official calculation.py.

    A line has file, question, ground truth and answer, separated by tabs. Whitespace within an
    answer becomes single spaces, since tabs and line breaks would break the file. A missing answer
    is "", since the reader takes lines in pairs.
    """
    lines: dict[str, list[str]] = {}
    for item, text in texts(items, predictions):
      fields = (item.extra["file"], item.extra["line"], item.truth, " ".join(text.split()))
      lines.setdefault(item.kind, []).append("\t".join(fields) + "\n")
    (folder / "mme").mkdir(parents=True, exist_ok=True)
    for kind, rows in lines.items():
      (folder / "mme" / f"{kind}.txt").write_text("".join(rows), encoding="utf-8", errors="replace")
    return [folder / "mme" / f"{kind}.txt" for kind in lines]


def _whole_pairs(items: list[Item]) -> list[Item]:
  """Gives both items of a pair the problem of either one."""
  problems = {item.extra["pair"]: item.problem for item in items if item.problem}
  return [
    dataclasses.replace(item, problem=item.problem or problems.get(item.extra["pair"], ""))
    for item in items
  ]
