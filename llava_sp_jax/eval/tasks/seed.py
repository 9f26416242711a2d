"""SEED-Bench (scripts/v1_5/eval/seed.sh): exactly the letter; its questions about images by default."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from llava_sp_jax.config import lookup
from llava_sp_jax.eval import files
from llava_sp_jax.eval.benchmark import LMMS_LONG, LOADER, Benchmark, Rules, settled
from llava_sp_jax.eval.task import Item, Predictions, Scores, mean_by_kind, text_of

ASKED = "llava-seed-bench.jsonl"
TRUTHS = "SEED-Bench.json"
LETTERS = ("A", "B", "C", "D")


class Split(NamedTuple):
  types: tuple[str, ...]  # of data; video: the middle frame, as an image
  file: str  # of the submission


SPLITS = {
  "image": Split(("image",), "seed_answers_image.jsonl"),
  "all": Split(("image", "video"), "seed_answers.jsonl"),
}


class Seed(Benchmark):
  name = "seed"
  homes = ("seed_bench",)
  needed = (ASKED, TRUTHS)
  options = ("protocol", "split")
  protocols: ClassVar = {
    "llava": Rules("the answer is exactly the letter, unanswered is wrong", LOADER),
    "lmms": Rules("the first letter of the stripped answer", LMMS_LONG,
                  lambda text: text.strip()[:1]),
  }  # fmt: skip

  def __init__(self, folder: str | Path, protocol: str = "llava", split: str = "image"):
    super().__init__(folder, protocol)
    self._types = lookup("seed split", split, SPLITS).types
    self.protocol += f"; split {split}"
    self.variant["split"] = split

  def items(self) -> list[Item]:
    path = self.folder / TRUTHS
    data = files.read_json(path)
    files.check_rows(path, [("the file", data)], ("questions", "question_type"))
    names = {number: name for name, number in data["question_type"].items()}
    files.check_rows(
      path,
      ((f"questions[{i}]", row) for i, row in enumerate(data["questions"])),
      ("question_id", "question_type_id", "data_type", "answer"),
    )
    rows = {str(row["question_id"]): row for row in self.rows(ASKED)}
    wanted = [row for row in data["questions"] if row["data_type"] in self._types]
    if missing := [str(r["question_id"]) for r in wanted if str(r["question_id"]) not in rows]:
      raise files.BenchmarkError(
        f"{self.folder / ASKED}: without {len(missing)} questions of {TRUTHS}: "
        f"{', '.join(missing[: files.SHOWN])}. Fetch both files again."
      )
    items = [
      Item(
        id=str(truth["question_id"]),
        question=rows[str(truth["question_id"])]["text"],
        images=(self.folder / rows[str(truth["question_id"])]["image"],),
        kind=names.get(truth["question_type_id"], str(truth["question_type_id"])),
        truth=truth["answer"],
        extra={"question_id": truth["question_id"], "data_type": truth["data_type"]},
        problem="" if truth["answer"] in LETTERS
        else f"the answer {truth['answer']!r:.40} is none of {', '.join(LETTERS)}",
      )
      for truth in wanted
    ]  # fmt: skip
    return settled(items, path)

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    read = self.rules.read(text)
    return {"score": float(read == item.truth), "read": read}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Accuracy; by question type, and of `image` and `video` where both were asked. A type without
    a right answer has 0.0 (the original stops with KeyError)."""
    missing = None if self.lmms else 0.0
    by_kind = mean_by_kind(items, predictions, self.verdict, missing=missing)
    for kind in self._types:
      mine = [item for item in items if item.extra["data_type"] == kind]
      by_kind[kind] = mean_by_kind(mine, predictions, self.verdict, missing=missing)["all"]
    unanswered = sum(text_of(predictions, item) is None for item in items)
    return Scores(by_kind["all"]["accuracy"], "accuracy", by_kind, {"unanswered": unanswered})

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """`seed_answers.jsonl`: {question_id, prediction} in the annotation's order, "" where there is
    no answer (the original, scripts/convert_seed_for_submission.py, stops there). Of a split that
    is not all of SEED, `seed_answers_<split>.jsonl`."""
    rows = (
      {"question_id": i.extra["question_id"],
       "prediction": self.rules.read(text_of(predictions, i) or "")}
      for i in items
    )  # fmt: skip
    return [files.write_lines(folder / SPLITS[self.variant["split"]].file, rows)]
