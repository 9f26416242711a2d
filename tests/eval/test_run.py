"""A task through the real engine: predictions, scores, failures that are counted, and the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava_sp_jax.eval import report
from llava_sp_jax.eval import run as run_lib
from llava_sp_jax.eval.task import Item, accuracy_by_kind
from llava_sp_jax.eval.tasks.easy_vqa import EasyVqa
from llava_sp_jax.infer import pretrained
from llava_sp_jax.infer.engine import Engine, Request
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.train import loop
from tests.conftest import ConfigMaker


@pytest.fixture(scope="module")
def run_folder(tiny_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("run") / "finetune"
  loop.train(tiny_config("finetune", train={"steps": 2}), folder)
  return folder


@pytest.fixture(scope="module")
def engine(run_folder: Path) -> Engine:
  return Engine(
    pretrained.from_run(run_folder), batch_size=4, generation=Generation(max_new_tokens=4)
  )


@pytest.fixture
def damaged(tiny_data: Path, tmp_path: Path) -> Path:
  """The test split with one broken and one missing picture."""
  folder = tmp_path / "data"
  shutil.copytree(tiny_data, folder)
  (folder / "images" / "3.png").write_bytes(b"no picture")
  (folder / "images" / "5.png").unlink()
  return folder


def test_an_unreadable_image_is_a_counted_failure(
  engine: Engine, run_folder: Path, damaged: Path, tmp_path: Path
) -> None:
  out = tmp_path / "eval"
  scores = run_lib.run(EasyVqa(damaged), engine, out, about={"step": 2, "checkpoint": "here"})
  assert [f["id"] for f in scores["failed"]] == ["test-3", "test-5"]
  assert "cannot be decoded" in scores["failed"][0]["error"]
  assert "no such file" in scores["failed"][1]["error"]
  assert scores["by_kind"]["all"]["items"] == 10
  records = report.read_lines(out / "predictions.jsonl")
  assert [r["id"] for r in records] == [f"test-{i}" for i in range(12) if i not in (3, 5)]
  assert json.loads((out / "scores.json").read_text()) == scores
  for record in records:
    assert record["right"] == (record["text"].strip() == record["truth"])
  page = report.write([str(run_folder)], str(out), str(tmp_path / "report"))
  assert "| not answered (image unreadable) | 2 | - |" in page
  assert "Checkpoint `here`, step 2" in page
  for name in ("loss.png", "accuracy.png", "answers.png"):
    with Image.open(tmp_path / "report" / name) as picture:
      assert min(picture.size) > 100
  assert (tmp_path / "report" / "report.md").read_text() == page
  assert json.loads((tmp_path / "report" / "scores.json").read_text()) == scores


def test_answers_do_not_depend_on_the_batch(engine: Engine, tiny_data: Path) -> None:
  requests = [Request(q, (tiny_data / "images" / f"{i}.png",))
              for i, q in enumerate(["what is it?", "is it blue or red or green?", "red?"])]  # fmt: skip
  together = [a.ids for a in engine.answer(requests)]
  alone = [next(iter(engine.answer([r]))).ids for r in requests]
  assert together == alone
  with Image.open(tiny_data / "images" / "0.png") as picture:
    assert next(iter(engine.answer([Request("what is it?", (picture,))]))).ids == alone[0]


def test_a_question_about_text_needs_no_image(engine: Engine) -> None:
  (answer,) = engine.answer([Request("what is it?")])
  assert len(answer.ids) <= 4


def test_limit_takes_the_first_items(engine: Engine, tiny_data: Path, tmp_path: Path) -> None:
  scores = run_lib.run(EasyVqa(tiny_data), engine, tmp_path / "out", limit=3)
  assert scores["by_kind"]["all"]["items"] == 3


def test_accuracy_by_kind_counts() -> None:
  records: list[dict[str, Any]] = [
    {"kind": "shape", "right": True}, {"kind": "shape", "right": False},
    {"kind": "colour", "right": True},
  ]  # fmt: skip
  assert accuracy_by_kind(records) == {
    "all": {"accuracy": 2 / 3, "items": 3}, "shape": {"accuracy": 0.5, "items": 2},
    "colour": {"accuracy": 1.0, "items": 1},
  }  # fmt: skip
  assert accuracy_by_kind([]) == {"all": {"accuracy": 0.0, "items": 0}}


def test_exact_match_after_stripping_blanks(tiny_data: Path) -> None:
  task = EasyVqa(tiny_data)
  item = Item("x", "q", None, "red", "colour")
  assert task.right(item, " red\n")
  assert not task.right(item, "Red")
  assert not task.right(item, "red.")
  assert {i.kind for i in task.items()} == {"yes/no", "shape", "colour"}


def test_the_data_s_hash_changes_with_the_data(damaged: Path) -> None:
  before = EasyVqa(damaged).data_hash()
  (damaged / "test.json").write_text((damaged / "test.json").read_text() + " ")
  assert EasyVqa(damaged).data_hash() != before


def test_missing_data_says_how_to_write_it(tmp_path: Path) -> None:
  with pytest.raises(FileNotFoundError, match=r"write it with scripts/prepare_easy_vqa.py --out"):
    EasyVqa(tmp_path)


def test_the_sheet_shows_some_mistakes_and_no_image_twice() -> None:
  rows = [{"id": i, "image": str(i // 2), "right": i % 3 > 0} for i in range(120)]
  sheet = report.sheet_rows(rows, 24)
  assert len(sheet) == 24
  assert sum(not r["right"] for r in sheet) == 6
  few = report.sheet_rows(rows[:2], 24)
  assert len(few) == 2
