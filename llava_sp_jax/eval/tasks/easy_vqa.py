"""easy-VQA (PyPI `easy-vqa`): one coloured shape; exact match of generated answers, test split."""

from __future__ import annotations

import json
from pathlib import Path

from llava_sp_jax.eval.task import Item, file_hash

KINDS = {"yes": "yes/no", "no": "yes/no", "circle": "shape", "rectangle": "shape",
         "triangle": "shape"}  # fmt: skip


class EasyVqa:
  name = "easy_vqa"
  protocol = "generated text, exact match after stripping blanks"

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
        r["id"], r["question"], images / r["image"], r["answer"], KINDS.get(r["answer"], "colour")
      )
      for r in rows
    ]

  def right(self, item: Item, text: str) -> bool:
    return text.strip() == item.truth

  def data_hash(self) -> str:
    return file_hash(self._file)
