"""easy-VQA (PyPI `easy-vqa`): one coloured shape; exact match of generated answers, test split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_sp_jax.eval.task import Item, Predictions, Scores, file_hash, mean_by_kind
from llava_sp_jax.infer.generation import Generation

KINDS = {"yes": "yes/no", "no": "yes/no", "circle": "shape", "rectangle": "shape",
         "triangle": "shape"}  # fmt: skip


class EasyVqa:
  name = "easy_vqa"
  protocol = "generated text, exact match after stripping blanks"
  generation = Generation(max_new_tokens=8)
  options = ()

  def __init__(self, folder: str | Path):
    """`folder` is what `scripts/prepare_easy_vqa.py` wrote. Raises: FileNotFoundError."""
    self._folder = Path(folder)
    self._file = self._folder / "test.json"
    if not self._file.is_file():
      raise FileNotFoundError(
        f"{self._file}: no such file; write it with scripts/prepare_easy_vqa.py --out {folder}"
      )

  def items(self) -> list[Item]:
    rows = json.loads(self._file.read_text())
    images = self._folder / "images"
    return [
      Item(
        id=r["id"],
        question=r["question"],
        images=(images / r["image"],),
        kind=KINDS.get(r["answer"], "colour"),
        truth=r["answer"],
      )
      for r in rows
    ]

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    return {"score": float(text.strip() == item.truth)}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    by_kind = mean_by_kind(items, predictions, self.verdict)
    return Scores(by_kind["all"]["accuracy"], "accuracy", by_kind)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    return []

  def data_hash(self) -> str:
    return file_hash(self._file)
