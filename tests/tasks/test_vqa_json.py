"""A user's own questions: rows of vqa_json, its rules, and rows that are left out."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.config import ConfigError
from llava_sp_jax.eval import run
from llava_sp_jax.results.scores import Unscored
from llava_sp_jax.tasks import scoring
from llava_sp_jax.tasks.files import BenchmarkError
from llava_sp_jax.tasks.vqa_json import RULES, VqaJson
from tests.eval.scripted import Scripted

ROWS: list[dict[str, Any]] = [
  {"question": "what is it?", "image": "0.png", "answer": "a circle", "kind": "shape"},
  {"id": "b", "text": "how many?", "image": ["1.png", "2.png"], "answers": ["2", "two"]},
  {"question": "no picture: 1+1?", "answers": 2},
]


@pytest.fixture
def file(tiny_data: Path, tmp_path: Path) -> Path:
  path = tmp_path / "mine.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
  return path


def test_rows_become_items(file: Path, tiny_data: Path) -> None:
  """From lines and from a list alike; an image's name starts from the folder that is given."""
  task = VqaJson(file, images=str(tiny_data / "images"), suffix="In one word.")
  first, second, third = task.items()
  assert (first.id, first.kind, first.truth) == ("1", "shape", ["a circle"])
  assert first.question == "what is it?\nIn one word."
  assert first.images == (tiny_data / "images/0.png",)
  assert second.id == "b"
  assert len(second.images) == 2
  assert (third.images, third.truth) == ((), ["2"])
  beside = file.with_name("mine.json")
  beside.write_text(json.dumps(ROWS))
  assert VqaJson(beside).items()[0].question.endswith("single word or phrase.")
  assert VqaJson(beside).items()[0].images == (file.parent / "0.png",)


@pytest.mark.parametrize(
  ("rule", "text", "answers", "score"),
  [
    ("exact", " A circle. ", ["a circle"], 1),
    ("exact", "circle", ["a circle"], 0),
    ("contains", "It is a red circle.", ["Circle"], 1),
    ("contains", "It is red.", ["circle"], 0),
    ("vqa", "red", ["red", "red", "red", "blue"], (2 / 3 * 3 + 1) / 4),
    ("relaxed", "104", ["100"], 1),
    ("relaxed", "106", ["100"], 0),
    ("relaxed", "50%", ["0.5"], 1),
    ("relaxed", "Yes", ["yes"], 1),
    ("relaxed", "0.0", ["0"], 0),
    ("anls", "kitten", ["sitting", "kitchen"], 1 - 2 / 7),
    ("anls", "abcd", ["abxy"], 0.5),
    ("anls", "abc", ["xyz"], 0),
    ("anls", "", [""], 1),
  ],
)
def test_rules(rule: str, text: str, answers: list[str], score: float) -> None:
  assert RULES[rule].score(text, answers) == pytest.approx(score)


def test_the_distance_equals_a_recursive_one() -> None:
  def slow(a: str, b: str) -> int:
    if not a or not b:
      return len(a) + len(b)
    if a[0] == b[0]:
      return slow(a[1:], b[1:])
    return 1 + min(slow(a[1:], b), slow(a, b[1:]), slow(a[1:], b[1:]))

  for a, b in (("flaw", "lawn"), ("", "abc"), ("gumbo", "gambol"), ("aab", "baa"), ("xx", "xx")):
    assert scoring._similarity(a, b) == pytest.approx(1 - slow(a, b) / max(len(a), len(b), 1))


def test_options_are_asked_and_read(tmp_path: Path) -> None:
  path = tmp_path / "choices.json"
  row = {"question": "which colour?", "options": ["red", "blue"]}
  path.write_text(json.dumps([{**row, "answer": "blue"}, {**row, "answer": "A"}]))
  task = VqaJson(path, "choice")
  first, second = task.items()
  assert first.question.startswith(
    "which colour?\nA. red\nB. blue\nAnswer with the option's letter"
  )
  assert task.verdict(first, "B.") == {"score": 1.0, "chosen": "B"}
  assert task.verdict(first, "it is blue") == {"score": 1.0, "chosen": "B"}
  assert task.verdict(second, "B")["score"] == 0.0


ODD: list[tuple[Any, str, str]] = [
  ({"image": "x", "answer": "y"}, "exact", "expected a question, found None"),
  ({"question": " ", "answer": "y"}, "exact", "expected a question, found ' '"),
  ({"question": ["q"], "answer": "y"}, "exact", r"expected a question, found \['q'\]"),
  ({"question": "q", "answer": "y", "image": [None]}, "exact",
   "expected texts under image, found None"),
  ({"question": "q", "answer": "y", "image": ""}, "exact", "expected texts under image, found ''"),
  ({"question": "q", "answer": "y"}, "choice", "expected 2 to 5 options, found 0"),
  ([], "exact", r"expected an object, found \[\]"),
  (None, "exact", "expected an object, found None"),
  ({"question": "q", "answer": math.nan}, "exact", "expected texts under answers, found nan"),
  ({"question": "q", "answer": math.inf}, "relaxed", "expected texts under answers, found inf"),
  ({"question": "q", "answer": "?!"}, "exact", r"nothing is left of the answer '\?!' when"),
  ({"question": "q", "answer": "the"}, "contains", "nothing is left of the answer 'the' when"),
  ({"question": "q", "answers": ["a", "."]}, "contains", "nothing is left of the answer 'a' when"),
  ({"question": "q", "answer": "b", "options": ["x", "y"]}, "choice",
   "one of the options, found 'b'"),
  ({"question": "q", "answer": "x", "options": ["x", "x"]}, "choice",
   "one of the options, found 'x'"),
  ({"question": "q", "answer": 2, "options": ["x", "y"]}, "choice", "one of the options, found '2'"),
  ({"question": "q", "answer": "A", "options": ["x", None]}, "choice",
   "expected texts under options, found None"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "rule", "said"), ODD)
def test_a_row_that_is_not_understood_is_left_out_by_its_name(
  tmp_path: Path, row: Any, rule: str, said: str
) -> None:
  good = {"id": "good", "question": "q", "answer": "b", "options": ["x", "b"]}
  path = tmp_path / "rows.json"
  path.write_text(json.dumps([good, row]))
  first, second = VqaJson(path, rule).items()
  assert (first.id, first.problem) == ("good", "")
  assert second.id == "2"
  assert re.search(said, second.problem)


def test_two_rows_of_one_name_are_refused(tmp_path: Path) -> None:
  path = tmp_path / "rows.json"
  row = {"question": "q", "answer": "a"}
  path.write_text(json.dumps([{**row, "id": 1}, {**row, "id": "1"}]))
  with pytest.raises(BenchmarkError, match="1 ids appear more than once, 1") as error:
    VqaJson(path)
  assert str(path) in str(error.value)


@pytest.mark.parametrize(
  ("answer", "text", "rule"),
  [(3.0, "3", "exact"), (3, "3.", "exact"), (" red ", "Red", "exact"), (2.5, "2.4", "relaxed"),
   ("Infinity", "infinity", "relaxed"), ("1e400", "1E400", "relaxed"), (-0.5, "-50%", "relaxed")],
)  # fmt: skip
def test_answers_are_read_as_people_write_them(
  tmp_path: Path, answer: Any, text: str, rule: str
) -> None:
  path = tmp_path / "rows.json"
  path.write_text(json.dumps([{"question": "q", "answer": answer}]))
  task = VqaJson(path, rule)
  (item,) = task.items()
  assert task.verdict(item, text) == {"score": 1.0}
  assert task.verdict(item, "30") == {"score": 0.0}


@pytest.mark.parametrize(
  ("row", "rule", "said"),
  [
    ({}, "exact", "expected at least 1 answers, found 0"),
    ({"answer": {"a": 1}}, "exact", "expected texts under answers, found {'a': 1}"),
    ({"answer": True}, "exact", "expected texts under answers, found True"),
    ({"answers": ["y"]}, "vqa", "expected at least 4 answers, found 1"),
    ({"answer": "y"}, "choice", "expected an answer that is one of the options, found 'y'"),
  ],
)
def test_a_row_whose_answers_say_nothing_is_asked_and_left_out(
  tmp_path: Path, row: dict[str, Any], rule: str, said: str
) -> None:
  options = {"question": "q", "image": "x.png", "options": ["a", "b"]}
  good = {**options, "answers": ["a"] * 4}
  path = tmp_path / "rows.json"
  path.write_text(json.dumps([good, {**options, **row}]))
  texts = ["x", "A" if rule == "choice" else "a"]  # the second is said first
  scores = run.run(VqaJson(path, rule), Scripted(texts=texts), tmp_path / "out")
  assert scores.left_out == (Unscored("2", said),)
  assert (scores.headline, scores.by_kind["all"]["items"]) == (1.0, 1)
  path.write_text(json.dumps([{**options, **row}]))
  with pytest.raises(BenchmarkError, match="expected questions that can be scored; 1: "):
    VqaJson(path, rule)


def test_files_that_are_none(tmp_path: Path) -> None:
  with pytest.raises(FileNotFoundError, match="expected a JSON list or JSON lines with question"):
    VqaJson(tmp_path / "gone.json")
  (tmp_path / "x").write_text('{"question": "q", "answer": "a"}\nnot json\n')
  first, second = VqaJson(tmp_path / "x").items()
  assert (first.problem, second.problem[:10]) == ("", "not JSON (")
  (tmp_path / "y").write_text("\n")
  with pytest.raises(BenchmarkError, match="empty; expected a JSON list"):
    VqaJson(tmp_path / "y")
  with pytest.raises(ConfigError, match="unknown 'fuzzy'; known: anls, choice, contains, exact"):
    VqaJson(tmp_path / "x", "fuzzy")


def test_scores_by_kind(file: Path, tmp_path: Path) -> None:
  rows = [{**row, "image": f"{place}.png"} for place, row in enumerate(ROWS)]
  file.write_text("\n".join(map(json.dumps, rows)))
  scores = run.run(VqaJson(file), Scripted(texts=["2", "A circle", "three"]), tmp_path / "out")
  assert scores.headline == pytest.approx(2 / 3)
  assert scores.by_kind["shape"]["accuracy"] == 1.0
  assert scores.variant == {"protocol": "exact"}
