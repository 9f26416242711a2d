"""MMBench: images in its file, circular rows, splits without answers, the sheet."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pytest
from PIL import Image

from llava_sp_jax.eval import run
from llava_sp_jax.tasks.catalog import TASKS
from llava_sp_jax.tasks.mmbench import MmBench
from llava_sp_jax.tasks.task import EvalError, Prediction
from tests.tasks.formats import answers, damage, right_letter

# --- MMBench ---


def test_mmbench_reads_its_images(root: Path) -> None:
  items = MmBench(root).items()
  for item in items:  # the third's field is the index of the first
    (data,) = item.images
    assert isinstance(data, bytes)
    assert Image.open(io.BytesIO(data)).size == (8, 8)
  assert items[2].images == items[0].images


def test_an_image_that_is_no_base64_is_left_to_the_engine(own: Path) -> None:
  damage(own / "mmbench/mmbench_dev_20230712.tsv", "\tiVBOR", "\t!BOR")
  assert MmBench(own).items()[0].images == (b"",)


def test_circular_asks_each_order_once_and_wants_all_right(root: Path) -> None:
  task = MmBench(root, "lmms", circular=True)
  items = task.items()
  assert len(items) == 3 + 2 + 4
  for item in items:
    texts = {"3": "dog", "5": "red", "9": "4"}
    assert item.extra["options"][item.truth] == texts[item.id.split("/")[0]]
  assert [i.truth for i in items[:3]] == ["B", "A", "C"]
  given = answers(items, right_letter)
  assert task.score(items, given).headline == 1.0
  given["9/2"] = Prediction("9/2", "A" if items[-2].truth != "A" else "B")
  scores = task.score(items, given)
  assert scores.headline == 2 / 3
  assert scores.by_kind["counts"] == {"accuracy": 0.0, "items": 1, "asked": 1}
  del given["5/1"]
  scores = task.score(items, given)
  assert scores.by_kind["all"] == {"accuracy": 1 / 2, "items": 2, "asked": 3}
  assert scores.figures["unanswered"] == 1
  always = task.score(items, answers(items, "B"))  # a letter that is always said wins nothing
  assert always.headline == 0.0


def test_rows_of_a_circular_file_belong_together(own: Path) -> None:
  """The official files with circular rows have them under index + 1,000,000 x n."""
  path = own / "mmbench/mmbench_dev_20230712.tsv"
  rows = list(csv.reader(path.read_text().splitlines(keepends=True), delimiter="\t"))
  rows.append(["1000005", "which one?", "", "blue", "red", "", "", "B", *rows[2][8:]])
  with path.open("w", newline="") as file:
    csv.writer(file, delimiter="\t").writerows(rows)
  task = MmBench(own, "lmms")
  items = task.items()
  scores = task.score(items, answers(items, "A"))
  assert scores.by_kind["colours"] == {"accuracy": 0.0, "items": 1, "asked": 1}
  assert scores.by_kind["all"]["asked"] == 3


def test_llava_s_protocol_leaves_mmbench_to_the_server(root: Path) -> None:
  task = MmBench(root)
  scores = task.score(task.items(), answers(task.items(), right_letter))
  assert scores.headline is None
  assert scores.figures["local"]["all"]["accuracy"] == 1.0


@pytest.mark.parametrize("protocol", ["llava", "lmms"])
@pytest.mark.parametrize("hidden", ["", "nan", "no column"])
def test_a_split_without_answers_has_no_truth_and_no_score(
  own: Path, protocol: str, hidden: str
) -> None:
  path = own / "mmbench/mmbench_dev_20230712.tsv"
  with path.open(newline="") as file:
    rows = list(csv.reader(file, delimiter="\t"))
  place = rows[0].index("answer")
  for row in rows[1:]:
    row[place] = hidden
  if hidden == "no column":
    rows = [[*row[:place], *row[place + 1 :]] for row in rows]
  with path.open("w", newline="") as file:
    csv.writer(file, delimiter="\t").writerows(rows)
  task = MmBench(own, protocol, circular=True)
  items = task.items()
  assert {item.truth for item in items} == {None}
  assert {"score" in task.verdict(item, "A") for item in items} == {False}
  scores = task.score(items, answers(items, "A"))
  assert scores.headline is None
  assert scores.figures == {}


def test_the_sheet_keeps_texts_as_texts(root: Path, tmp_path: Path) -> None:
  openpyxl = pytest.importorskip("openpyxl", reason="the extra xlsx is not installed")
  task = MmBench(root, circular=True)
  items = task.items()
  given = answers(items, "=B\x00 1")
  given.pop("5")
  (file,) = task.submission(items, given, tmp_path)
  assert file.name == "mmbench_dev_20230712.xlsx"
  page = openpyxl.load_workbook(file).active
  assert page["G2"].data_type == "s"  # "f" would be a formula
  header, *rows = page.iter_rows(values_only=True)
  assert header == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
  assert rows[0] == (3, 'what is "it"?', "cat", "dog", "cow", None, "=B 1", "B", "dev")
  assert rows[1][4:7] == (None, None, None)
  assert len(rows) == 3


def test_without_openpyxl_it_says_what_to_install(
  root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setitem(sys.modules, "openpyxl", None)
  task = MmBench(root)
  with pytest.raises(ModuleNotFoundError, match=r"pip install llava-sp-jax\[xlsx\]"):
    task.submission(task.items(), {}, tmp_path)
  with pytest.raises(EvalError, match=r"20230712.xlsx: .*pip install llava-sp-jax\[xlsx\]"):
    run.check(task)
  for other in (TASKS["pope"](root), TASKS["seed"](root)):
    run.check(other)
