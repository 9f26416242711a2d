"""easy-VQA (PyPI `easy-vqa`), test split: questions about a colored shape, by exact match."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.tasks import files
from llava_sp_jax.tasks.benchmark import settled
from llava_sp_jax.tasks.task import Item, Predictions, Scores, file_hash, mean_by_kind

KINDS = {"yes": "yes/no", "no": "yes/no", "circle": "shape", "rectangle": "shape",
         "triangle": "shape"}  # fmt: skip


class EasyVqa:
  """Implements easy-VQA: questions about generated pictures of one colored shape."""

  name = "easy_vqa"
  protocol = "generated text, exact match after stripping blanks"
  generation = Generation(max_new_tokens=8)
  options = ()

  def __init__(self, folder: str | Path):
    """Reads a folder that `scripts/prepare_easy_vqa` wrote.

    Raises: FileNotFoundError for a folder without its test.json.
    """
    self._folder = Path(folder)
    self._file = self._folder / "test.json"
    if not self._file.is_file():
      raise FileNotFoundError(
        f"{self._file}: no such file; write it with scripts/prepare_easy_vqa.py --out {folder}"
      )

  def items(self) -> list[Item]:
    """Returns the questions.

    Raises: BenchmarkError for rows without a question or image, and when none can be scored.
    """
    rows = files.read_json(self._file, list)
    named = [(f"[{i}]", row) for i, row in enumerate(rows)]
    files.check_rows(self._file, named, ("id", "question", "image"))
    return settled([self._item(row) for row in rows], self._file)

  def _item(self, row: dict[str, Any]) -> Item:
    truth: Any = row.get("answer")
    understood = files.is_text(truth) and truth == truth.strip()  # otherwise no answer can match
    return Item(
      id=str(row["id"]),
      question=row["question"],
      images=(self._folder / "images" / row["image"],),
      kind=KINDS.get(truth, "colour") if understood else "unknown",
      truth=truth,
      problem="" if understood else f"expected an answer without outer blanks, found {truth!r:.80}",
    )

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    """Returns score 1 for an answer that equals the ground truth without outer blanks, else 0."""
    return {"score": float(text.strip() == item.truth)}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    """Returns the accuracy, overall and by kind of question."""
    by_kind = mean_by_kind(items, predictions, self.verdict)
    return Scores(by_kind["all"]["accuracy"], "accuracy", by_kind)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    """Writes nothing: all is scored here."""
    return []

  def data_hash(self) -> str:
    """Returns a hash, 16 hexadecimal digits, of the file of questions."""
    return file_hash(self._file)
