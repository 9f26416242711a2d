"""SEED-Bench (scripts/v1_5/eval/seed.sh): multiple choice; by default about images alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from llava_sp_jax.config import lookup
from llava_sp_jax.tasks import files
from llava_sp_jax.tasks.benchmark import LMMS_LONG, LOADER, Benchmark, Rules, settled
from llava_sp_jax.tasks.task import Item, Predictions, Scores, mean_by_kind, text_of

ASKED = "llava-seed-bench.jsonl"
TRUTHS = "SEED-Bench.json"
LETTERS = ("A", "B", "C", "D")


class Split(NamedTuple):
  """Defines a split of the questions."""

  types: tuple[str, ...]  # values of `data_type`; of a video the middle frame is read as an image
  file: str  # name of the submission


SPLITS = {
  "image": Split(("image",), "seed_answers_image.jsonl"),
  "all": Split(("image", "video"), "seed_answers.jsonl"),
}


class Seed(Benchmark):
  """Implements SEED-Bench.

  `split` chooses the questions: about images, or also about the middle frames of videos.
  """

  name = "seed"
  homes = ("seed_bench",)
  needed = (ASKED, TRUTHS)
  options = ("protocol", "split")
  protocols: ClassVar = {
    "llava": Rules("the answer is exactly the letter, unanswered is wrong", LOADER),
    "lmms": Rules(
      "the first letter of the stripped answer", LMMS_LONG, lambda text: text.strip()[:1]
    ),
  }

  def __init__(self, folder: str | Path, protocol: str = "llava", split: str = "image"):
    """Finds the files of the benchmark.

    `folder` is its own or a root above it; `split`, "image" or "all", chooses the questions.
    """
    super().__init__(folder, protocol)
    self._types = lookup("seed split", split, SPLITS).types
    self.protocol += f"; split {split}"
    self.variant["split"] = split

  def items(self) -> list[Item]:
    """Returns the questions of the split, in the order of the annotation."""
    path = self.folder / TRUTHS
    match files.read_json(path):
      case {"questions": list(questions), "question_type": dict(types)}:
        names = {str(number): name for name, number in types.items()}
      case _:
        raise files.BenchmarkError(f"{path}: expected a list of questions and their question_type")
    named = [(f"questions[{i}]", row) for i, row in enumerate(questions)]
    files.check_rows(path, named, ("question_id",))
    rows = {str(row["question_id"]): row for row in self.rows(ASKED)}
    elsewhere = [kind for kind in SPLITS["all"].types if kind not in self._types]
    wanted = [row for row in questions if row.get("data_type") not in elsewhere]
    if missing := [str(r["question_id"]) for r in wanted if str(r["question_id"]) not in rows]:
      raise files.BenchmarkError(
        f"{self.folder / ASKED}: without {len(missing)} questions of {TRUTHS}: "
        f"{', '.join(missing[: files.SHOWN])}. Fetch both files again."
      )
    items = []
    for truth in wanted:
      row, number = rows[str(truth["question_id"])], str(truth.get("question_type_id"))
      items.append(
        Item(
          id=str(truth["question_id"]),
          question=row["text"],
          images=(self.folder / row["image"],),
          kind=names.get(number, number),
          truth=truth.get("answer"),
          extra={"question_id": truth["question_id"], "data_type": truth.get("data_type")},
          problem=self._problem(truth),
        )
      )
    return settled(items, path)

  def _problem(self, truth: dict[str, Any]) -> str:
    """Returns why an answer to this question cannot be scored; "" if it can."""
    if truth.get("answer") not in LETTERS:
      return f"the answer {truth.get('answer')!r:.40} is none of {', '.join(LETTERS)}"
    if truth.get("data_type") not in self._types:
      return f"the data_type {truth.get('data_type')!r:.40} is none of {', '.join(self._types)}"
    return ""

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    """Returns score 1 if an answer is the ground truth's letter, else 0; `read` is its letter."""
    read = self.rules.read(text)
    return {"score": float(read == item.truth), "read": read}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns the accuracy, overall, by question type and by type of data (`image`, `video`).

    A type without a right answer has 0.0 (the original raises KeyError).
    """
    missing = None if self.lmms else 0.0
    by_kind = mean_by_kind(items, predictions, self.verdict, missing=missing)
    for kind in self._types:
      members = [item for item in items if item.extra["data_type"] == kind]
      by_kind[kind] = mean_by_kind(members, predictions, self.verdict, missing=missing)["all"]
    unanswered = sum(text_of(predictions, item) is None for item in items)
    return Scores(by_kind["all"]["accuracy"], "accuracy", by_kind, {"unanswered": unanswered})

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """Writes the file that SPLITS names: lines {question_id, prediction} in the annotation's order.

    Writes "" for a missing answer (the original, scripts/convert_seed_for_submission.py, fails).
    """
    rows = (
      {
        "question_id": i.extra["question_id"],
        "prediction": self.rules.read(text_of(predictions, i) or ""),
      }
      for i in items
    )
    return [files.write_lines(folder / SPLITS[self.variant["split"]].file, rows)]
