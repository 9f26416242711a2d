"""Damaged results are read or named: settings, answers, sessions, scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.eval import run
from llava_sp_jax.results import report
from llava_sp_jax.tasks.catalog import TASKS
from llava_sp_jax.tasks.task import EvalError
from tests.eval.scripted import Scripted

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
  assert (scores.sessions, scores.sessions_damaged) == (1, 1)
  assert "1 lines of sessions*.jsonl could not be read" in capsys.readouterr().out
  again = run.run(TASKS["pope"](root), Scripted(), results)  # its own session is a line of its own
  assert (again.sessions, again.sessions_damaged) == (2, 1)


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
  assert run.run(task, Scripted(), results).answered == 12  # nothing was there to protect


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
  assert run.run(TASKS["pope"](root), engine, results).answered == 12
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
    {**scores, "left_out": [{"id": "1"}]},
    {**scores, "questions": "12"},
    *({k: v for k, v in scores.items() if k != key} for key in ("task", "metric", "figures")),
  ]


@pytest.mark.parametrize(
  "line", ['{"seconds": NaN, "engine": {}}', '{"seconds": 1, "engine": {"x": 1e999}}']
)
def test_a_session_that_counts_nothing_is_left_out(root: Path, results: Path, line: str) -> None:
  with (results / "sessions.jsonl").open("a") as file:
    file.write(line + "\n" + "[" * 99999 + "\n")
  scores = run.finish(TASKS["pope"](root), results)
  assert (scores.sessions, scores.sessions_damaged) == (1, 2)


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
  assert scores.by_kind["all"]["items"] == 4
  table = [line for line in page.splitlines() if line.startswith("|")]
  assert len(table) == 2 + 5
  assert "| a\\|b | 1 | 1 |" in page
  assert "\x1b" not in page
  assert "1 steps, last loss 2.5000" in page
  assert (tmp_path / "report/answers.png").is_file()
