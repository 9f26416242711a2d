"""Rows that cannot be scored are named and the others are scored; damaged results are read or named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import cli
from llava_sp_jax.eval import run
from llava_sp_jax.results import report, tables
from llava_sp_jax.tasks.catalog import TASKS
from llava_sp_jax.tasks.files import BenchmarkError
from llava_sp_jax.tasks.mmbench import MmBench
from llava_sp_jax.tasks.task import EvalError
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
  assert json.loads((out / run.SCORES).read_text())["left_out"] == [{"id": "2", "error": why}]
  said = (
    f"Over 11 of 12 questions; 1 left out, whose truth or options are not understood: 2 ({why})."
  )
  assert tables.coverage(scores) == said
  assert said.replace("'", "&#39;") in (out / "index.html").read_text().replace("'", "&#39;")
  assert by_id(out)["2"]["verdict"] == {"problem": why}


# --- damaged results ---


@pytest.fixture
def results(root: Path, tmp_path: Path) -> Path:
  run.run(TASKS["pope"](root), Scripted(), tmp_path / "out")
  return tmp_path / "out"


@pytest.mark.parametrize(
  "torn", [b'{"part": "0/1", "sec', b"\xff\xfe\n", b"3\n", b'{"seconds": "x", "engine": {}}\n']
)
def test_a_torn_line_of_sessions_is_left_out_and_told(
  root: Path, results: Path, torn: bytes, capsys: pytest.CaptureFixture
) -> None:
  with (results / "sessions.jsonl").open("ab") as file:
    file.write(torn)
  scores = run.finish(TASKS["pope"](root), results)
  assert (scores["sessions"], scores["sessions_damaged"]) == (1, 1)
  assert "1 lines of sessions*.jsonl could not be read" in capsys.readouterr().out
  again = run.run(TASKS["pope"](root), Scripted(), results)  # its own session is a line of its own
  assert (again["sessions"], again["sessions_damaged"]) == (2, 1)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"settings": 3, "about": {}}', "\0"])
def test_damaged_settings_are_named(root: Path, results: Path, text: str, tmp_path: Path) -> None:
  (results / "settings.json").write_text(text)
  task = TASKS["pope"](root)
  for again in (
    lambda: run.run(task, Scripted(), results),
    lambda: run.finish(task, results),
    lambda: run.check(task, results),
  ):
    with pytest.raises(EvalError, match=r"out/settings.json: damaged, so nobody knows"):
      again()
  (results / "predictions.jsonl").write_text("")
  assert run.run(task, Scripted(), results)["answered"] == 12  # nothing was there to protect


LINES: dict[str, Callable[[dict[str, Any]], Any]] = {
  "no JSON": lambda line: "torn",
  "a list": lambda line: [1],
  "another id": lambda line: {**line, "id": [1]},
  "no truth": lambda line: {k: v for k, v in line.items() if k != "truth"},
  "a score that is none": lambda line: {**line, "verdict": {"score": "1"}},
  "an image that is none": lambda line: {**line, "images": [None]},
  "no question": lambda line: {k: v for k, v in line.items() if k != "question"},
  "text that is none": lambda line: {**line, "text": None},
  "a verdict that is none": lambda line: {**line, "verdict": 1},
}


@pytest.mark.parametrize("kind", LINES)
def test_a_damaged_answer_is_named_with_its_line(root: Path, results: Path, kind: str) -> None:
  path = results / "predictions.jsonl"
  first, *rest = path.read_text().splitlines()
  path.write_text(
    "\n".join([first, json.dumps(LINES[kind](json.loads(rest[0]))), *rest[1:]]) + "\n"
  )
  with pytest.raises(
    EvalError, match=r"predictions.jsonl, line 2: expected an answer with id, quest"
  ):
    run.finish(TASKS["pope"](root), results)
  path.write_text("\n".join([first, *rest[1:]]) + "\n")  # as the message says
  engine = Scripted()
  assert run.run(TASKS["pope"](root), engine, results)["answered"] == 12
  assert len(engine.asked) == 1


def test_a_report_names_what_is_damaged(results: Path, tmp_path: Path) -> None:
  metrics = tmp_path / "run/metrics.jsonl"
  metrics.parent.mkdir()
  metrics.write_bytes(b'{"step": 1, "loss": 2.5, "quarantined": 0}\n{"step": 2, "lo\n\xff\n')
  assert report.read_lines(metrics) == [{"step": 1, "loss": 2.5, "quarantined": 0}]
  metrics.write_text("torn")
  with pytest.raises(EvalError, match=r"metrics.jsonl: no record that can be read"):
    report.read_lines(metrics)
  whole = json.loads((results / "scores.json").read_text())
  for text in ("{", "[]", "{}", *(json.dumps(changed) for changed in torn(whole))):
    (results / "scores.json").write_text(text)
    with pytest.raises(EvalError, match=r"scores.json: damaged; llava-sp eval --merge --out"):
      report.write([], str(results), str(tmp_path / "report"))


def torn(scores: dict[str, Any]) -> list[dict[str, Any]]:
  """Scores of another kind, or of which a part is missing or no figure."""
  rows = scores["by_kind"]
  return [
    {**scores, "by_kind": {}},
    {**scores, "by_kind": {**rows, "all": 3}},
    {**scores, "by_kind": {**rows, "x": {"items": 1, "asked": 1, "f1": None}}},
    {**scores, "headline": float("nan")},
    {**scores, "interval": {}},
    {**scores, "failures": [1]},
    *({k: v for k, v in scores.items() if k != key} for key in ("task", "metric", "figures")),
  ]


@pytest.mark.parametrize(
  "line", ['{"seconds": NaN, "engine": {}}', '{"seconds": 1, "engine": {"x": 1e999}}']
)
def test_a_session_that_counts_nothing_is_left_out(root: Path, results: Path, line: str) -> None:
  with (results / "sessions.jsonl").open("a") as file:
    file.write(line + "\n" + "[" * 99999 + "\n")
  scores = run.finish(TASKS["pope"](root), results)
  assert (scores["sessions"], scores["sessions_damaged"]) == (1, 2)


def test_a_report_shows_what_others_would_take_for_a_language(
  tiny_data: Path, tmp_path: Path
) -> None:
  """Dollars in a question, marks of tables in a kind, a record without its loss."""
  rows = [
    {
      "question": "is it $5 or $$?",
      "image": f"{tiny_data}/images/0.png",
      "answer": "$$",
      "kind": kind,
    }
    for kind in ("[/red]", "a|b", "$x_{$", "\x1b[2J")
  ]
  file = tmp_path / "rows.json"
  file.write_text(json.dumps(rows))
  task = TASKS["vqa_json"](file, "relaxed")
  scores = run.run(task, Scripted(texts=["$$", "$\\frac$"]), tmp_path / "out")
  metrics = tmp_path / "run/metrics.jsonl"
  metrics.parent.mkdir()
  metrics.write_text('{"step": 1, "loss": 2.5}\n{"step": 2}\n')
  page = report.write([str(metrics.parent)], str(tmp_path / "out"), str(tmp_path / "report"))
  assert scores["by_kind"]["all"]["items"] == 4
  table = [line for line in page.splitlines() if line.startswith("|")]
  assert len(table) == 2 + 5
  assert "| a\\|b | 1 | 1 |" in page
  assert "\x1b" not in page
  assert "1 steps, last loss 2.5000" in page
  assert (tmp_path / "report/answers.png").is_file()


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
