"""Rows that cannot be scored are named and the others are scored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llava_sp_jax import cli
from llava_sp_jax.eval import run
from llava_sp_jax.results import scores as scores_lib
from llava_sp_jax.results import tables
from llava_sp_jax.tasks.catalog import TASKS
from llava_sp_jax.tasks.files import BenchmarkError
from llava_sp_jax.tasks.mmbench import MmBench
from tests.eval.scripted import Scripted, by_id
from tests.tasks.formats import RIGHT, answers, damage

GQA, SQA = "gqa/data/testdev_balanced_questions.json", "scienceqa/problems.json"
MME, MMB = "MME/MME_Benchmark_release_version/count/b.txt", "mmbench/mmbench_dev_20230712.tsv"
TEXT, ASKED = "textvqa/TextVQA_0.5.1_val.json", "textvqa/llava_textvqa_val_v051_ocr.jsonl"
RANDOM, SEED = "pope/coco/coco_pope_random.json", "seed_bench/SEED-Bench.json"
WILD, MMVET = "llava-bench-in-the-wild", "mm-vet/mm-vet.json"
NOON = '["7:30", "7:30", "7:30", "noon", "noon", "noon", "noon", "noon", "noon", "noon"]'
PAIR = {"count/b.png#1", "count/b.png#2"}  # of MME: it is scored as a whole

# benchmark, file, what becomes what in it, the items that cannot be scored, and why
ROWS: list[tuple[str, str, str, str, set[str], str]] = [
  ("gqa", GQA, '"201"', '"9"', {"201"}, "no truth that is understood in testdev_.*: None"),
  ("gqa", GQA, '"answer": "yes"', '"answer": null', {"201"}, "no truth that is understood"),
  ("gqa", GQA, '"answer": "yes"', '"answer": " "', {"201"}, "no truth that is understood"),
  ("gqa", GQA, '"answer": "yes"', '"answer": NaN', {"201"}, "no truth that is understood"),
  ("gqa", GQA, '"answer": "yes"', '"answer": ["yes"]', {"201"}, "no truth that is understood"),
  ("gqa", GQA, '"structural"', '"shape"', {"200"}, "no truth that is understood .*'shape'"),
  ("scienceqa", SQA, '"answer": 1', '"answer": 5', {"1"}, "the answer 5 is none of 0 to 2, its cho"),
  ("scienceqa", SQA, '"answer": 1', '"answer": 3', {"1"}, "the answer 3 is none of 0 to 2"),
  ("scienceqa", SQA, '"answer": 1', '"answer": "B"', {"1"}, "the answer 'B' is none of"),
  ("scienceqa", SQA, '"answer": 1', '"answer": -1', {"1"}, "the answer -1 is none of"),
  ("scienceqa", SQA, '"answer": 1', '"answer": true', {"1"}, "the answer True is none of"),
  ("scienceqa", SQA, '"answer": 1', '"answer": 1.0', {"1"}, "the answer 1.0 is none of"),
  ("scienceqa", SQA, '"choices"', '"options"', {"0"}, "without choices in problems.json"),
  ("scienceqa", SQA, '["ice", "fire"]', '["ice", null]', {"0"}, "choices that are not understood"),
  ("scienceqa", SQA, '["ice", "fire"]', "[]", {"0"}, "choices that are not understood"),
  ("scienceqa", SQA, '"0": {', '"00": {', {"0"}, "without question, choices, answer"),
  ("textvqa", TEXT, NOON, "[]", {"im0#2"}, r"no list of 4 or more .* but \[\]"),
  ("textvqa", TEXT, NOON, '["7:30", "7:30", "7:30", 7]', {"im0#2"}, "no list of 4 or more human"),
  ("textvqa", TEXT, NOON, '["7:30", "7:30", "7:30"]', {"im0#2"}, "no list of 4 or more human"),
  ("textvqa", TEXT, '"answers"', '"x"', {"im0#1"}, "human answers, but None"),
  ("textvqa", TEXT, '"What BRAND is it?"', "7", {"im0#1"}, "no annotation of this image and quest"),
  ("textvqa", ASKED, "BRAND", "maker", {"im0#1"}, "no annotation of this image and question in Te"),
  ("textvqa", ASKED, "it?\\n", "it?\\n\\n", {"im0#1"}, "expected a question, .* in lines, found 'What"),
  ("pope", RANDOM, '"label": "no"', '"label": "perhaps"', {"2"},
   "the label 'perhaps' is neither 'yes' nor 'no'"),
  ("pope", RANDOM, '"label": "no"', '"label": null', {"2"}, "label None"),
  ("pope", RANDOM, '"label": "no"', '"label": "No"', {"2"}, "label 'No' is neither"),
  ("pope", RANDOM, '"label": "no"', '"truth": "no"', {"2"}, "label None"),
  ("pope", RANDOM, '{"question_id": 2', '{"question_id" 2', {"2"}, "label None"),
  ("seed", SEED, '"answer": "B"', '"answer": "F"', {"1"}, "'F' is none of A, B, C, D"),
  ("seed", SEED, '"answer": "B"', '"answer": "b"', {"1"}, "'b' is none of A, B, C, D"),
  ("seed", SEED, '"answer": "B"', '"answer": null', {"1"}, "None is none of"),
  ("seed", SEED, '"answer": "B"', '"truth": "B"', {"1"}, "None is none of"),
  ("seed", SEED, '"data_type": "image"', '"data_type": "Image"', {"0"}, "'Image' is none of image"),
  ("mme", MME, "\tYes", "\tPerhaps", PAIR, "b.txt: expected a quest"),
  ("mme", MME, "\tYes", " Yes", PAIR, "a tab and Yes or No, found"),
  ("mme", MME, "Is b two?", "Is b three?", PAIR, "no answer to 'Is b two.* in MME_Bench.*/count"),
  ("mme", MME, "Is b two?  ", "Is b one? ", PAIR, "b.txt: Yes and No to 'Is b one"),
  ("mmbench", MMB, "\tcat\t", "\t\t", {"3"}, "0 options; expected two at least"),
  ("mmbench", MMB, "\tdog\t", "\t\t", {"3"}, "1 options; expected two at least"),
  ("mmbench", MMB, "\t2\t3\t", "\t2\tnan\t", {"9"}, "option D stands behind an empty one, C"),
  ("mmbench", MMB, "\tB\tanimals", "\tD\tanimals", {"3"}, "'D' is none of the options A, B, C"),
  ("mmbench", MMB, "\tB\tanimals", "\tAB\tanimals", {"3"}, "'AB' is none of the options"),
  ("mmbench", MMB, "\tB\tanimals", "\tb\tanimals", {"3"}, "'b' is none of the options"),
  ("mmbench", MMB, "\tB\tanimals", "\t\tanimals", {"3"}, "the answer '' is none of"),
  ("llava_bench", f"{WILD}/context.jsonl", "001.jpg", "009.jpg", {"1", "3"},
   "no caption of the image 001.jpg in context.jsonl"),
  ("llava_bench", f"{WILD}/context.jsonl", '"A dog."', "7", {"1", "3"}, "no caption of the image"),
  ("llava_bench", f"{WILD}/answers_gpt4.jsonl", '"truth 1"', "null", {"1"}, "no answer that is und"),
  ("llava_bench", f"{WILD}/answers_gpt4.jsonl", '"question_id": 1', '"question_id" 1', {"1"},
   "no answer that is understood in answers_gpt4.jsonl: None"),
  ("llava_bench", f"{WILD}/questions.jsonl", '"detail"', '"other"', {"1"}, "'other' is none of conv"),
  ("mmvet", MMVET, '"here"', '""', {"v1_2"}, "no truth that is understood in mm-vet.json"),
  ("mmvet", MMVET, '["math", "ocr"]', '["math", 7]', {"v1_0"}, "no truth that is understood"),
  ("mmvet", MMVET, '"v1_1"', '"v2_1"', {"v1_1"}, "no truth that is understood in .*: None"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "old", "new", "bad", "message"), ROWS)
def test_the_row_is_named_and_the_others_are_scored(
  own: Path, name: str, file: str, old: str, new: str, bad: set[str], message: str
) -> None:
  protocol = "lmms" if name == "mmbench" else "llava"
  whole = TASKS[name](own, protocol)
  items = whole.items()
  best = whole.score(items, answers(items, RIGHT[name]))
  right = answers(items, RIGHT[name])
  damage(own / file, old, new)
  task = TASKS[name](own, protocol)
  found = task.items()
  assert [item.id for item in found] == [item.id for item in items]  # all are asked
  assert {item.id for item in found if item.problem} == bad
  assert all(re.search(message, item.problem) for item in found if item.problem)
  scores = task.score(found, right)
  assert scores.by_kind["all"]["items"] == best.by_kind["all"]["items"] - len(bad)
  assert scores.by_kind["all"]["asked"] == best.by_kind["all"]["asked"]
  assert scores.headline == best.headline  # the others are right, as before


def write(folder: Path, rows: list[list[str]], letters: str = "ABCD") -> Path:
  """MMBench's file with these options and answers."""
  image = "iVBORw0KGgo="
  header = ["index", "question", "hint", *letters, "answer", "category", "image"]
  lines = [[str(i), f"q{i}?", "nan", *row, "c", image] for i, row in enumerate(rows, 1)]
  (folder / "mmbench").mkdir()
  text = "\n".join("\t".join(line) for line in [header, *lines])
  (folder / "mmbench/mmbench_dev_20230712.tsv").write_text(text + "\n")
  return folder


COLORS = ["red", "green", "blue", "grey"]


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize(
  ("row", "problem"),
  [
    (["red", "green", "blue", "None", "D"], "the answer 'D' is none of the options A, B, C"),
    (["red", "nan", "blue", "grey", "A"], "1 options; expected two at least, from A on"),
  ],
)
@pytest.mark.parametrize("protocol", ["llava", "lmms"])
def test_one_row_of_mmbench_does_not_switch_the_score_off(
  tmp_path: Path, row: list[str], problem: str, protocol: str, circular: bool
) -> None:
  task = MmBench(write(tmp_path, [[*COLORS, "B"]] * 3 + [row]), protocol, circular=circular)
  items = task.items()
  assert {item.problem for item in items if item.id.split("/")[0] == "4"} == {problem}
  given = answers(items, lambda item: item.truth or "A")
  scores = task.score(items, given)
  by_kind = scores.by_kind if protocol == "lmms" else scores.figures["local"]
  assert by_kind["all"] == {"accuracy": 1.0, "items": 3, "asked": 4}
  assert "score" not in task.verdict(next(i for i in items if i.problem), "A")


def test_a_fifth_option_is_one_where_the_protocol_asks_it(tmp_path: Path) -> None:
  rows = [[*COLORS, "white", "B"], [*COLORS, "white", "E"]]
  folder = write(tmp_path, rows, "ABCDE")
  assert [item.problem for item in MmBench(folder, "lmms").items()] == ["", ""]
  llava = MmBench(folder).items()
  assert [bool(item.problem) for item in llava] == [False, True]
  assert "'E' is none of the options A, B, C, D" in llava[1].problem


def test_a_file_of_which_nothing_can_be_scored_is_refused(tmp_path: Path) -> None:
  folder = write(tmp_path, [[*COLORS, "yes"]] * 7)
  with pytest.raises(
    BenchmarkError, match=r"questions that can be scored; 1: the answer 'yes' .* 2 m"
  ):
    MmBench(folder).items()


def test_scores_say_what_was_left_out_and_why(own: Path, tmp_path: Path) -> None:
  damage(own / "pope/coco/coco_pope_random.json", '"label": "no"', '"label": "perhaps"')
  out = tmp_path / "out"
  scores = run.run(TASKS["pope"](own), Scripted(), out)
  why = "the label 'perhaps' is neither 'yes' nor 'no'"
  assert json.loads((out / scores_lib.FILE).read_text())["left_out"] == [{"id": "2", "error": why}]
  said = (
    f"Over 11 of 12 questions; 1 left out, whose truth or options are not understood: 2 ({why})."
  )
  assert tables.coverage(scores) == said
  assert said.replace("'", "&#39;") in (out / "index.html").read_text().replace("'", "&#39;")
  assert by_id(out)["2"]["verdict"] == {"problem": why}


def test_questions_without_an_answer_end_in_a_code(
  root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  out = tmp_path / "out"
  run.run(TASKS["pope"](root), Scripted(fails={"COCO_1.jpg": "no such file"}), out)
  arguments = ["eval", "--merge", "--task=pope", f"--data={root}", f"--out={out}"]
  assert cli.main(arguments) == 1
  wanted = (
    "llava-sp eval: pope: 3 of 12 questions have no answer, first 2 (no such file); --retry asks"
  )
  assert wanted in capsys.readouterr().err
  assert cli.main([*arguments, "--allow-missing"]) == 0
  assert wanted in capsys.readouterr().err
  whole = tmp_path / "whole"
  run.run(TASKS["pope"](root), Scripted(), whole)
  assert cli.main([*arguments[:-1], f"--out={whole}"]) == 0
  assert capsys.readouterr().err == ""
