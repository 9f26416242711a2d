"""easy-VQA: its rule, and what is said where its data are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_sp_jax.tasks.easy_vqa import EasyVqa
from llava_sp_jax.tasks.task import Item


def test_exact_match_after_stripping_blanks(tiny_data: Path) -> None:
  task = EasyVqa(tiny_data)
  item = Item("x", "q", (), "colour", "red")
  assert [task.verdict(item, t)["score"] for t in (" red\n", "Red", "red.")] == [1, 0, 0]
  assert {i.kind for i in task.items()} == {"yes/no", "shape", "colour"}


def test_missing_data_says_how_to_write_it(tmp_path: Path) -> None:
  with pytest.raises(FileNotFoundError, match=r"write it with scripts/prepare_easy_vqa.py --out"):
    EasyVqa(tmp_path)
