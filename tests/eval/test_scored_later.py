"""What comes after the answers: a judge, truths; no answer is asked again, and all that is said of
single answers follows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.eval import run
from llava_sp_jax.results import compare, page, tables
from llava_sp_jax.results import scores as scores_lib
from llava_sp_jax.results.predictions import Part
from llava_sp_jax.tasks.catalog import TASKS
from llava_sp_jax.tasks.judge import Ask
from llava_sp_jax.tasks.mmbench import MmBench
from tests.eval.scripted import Scripted, by_id
from tests.tasks import formats


def judge(ask: Ask) -> str:
  """Reads each benchmark's form: the best for the answer "ZIG", less for "ZAG"."""
  good = "ZIG" in ask.prompt
  if ask.max_tokens == 256:  # MMBench
    return "B" if good else "A"
  if ask.max_tokens == 1024:  # LLaVA-Bench
    return "8 9" if good else "8 4"
  return "1.0" if good else "0.5"


# benchmark, protocol, verdicts without a judge, and with it on "ZIG" and on "ZAG"
JUDGED: list[tuple[str, str, Any, Any, Any]] = [
  ("mmvet", "llava", {}, {"score": 1.0}, {"score": 0.5}),
  (
    "llava_bench",
    "llava",
    {},
    {"score": 1.0, "judged": [8.0, 9.0]},
    {"score": 0.5, "judged": [8.0, 4.0]},
  ),
]


@pytest.mark.parametrize(("name", "protocol", "before", "zig", "zag"), JUDGED)
def test_a_judge_that_comes_later_says_what_is_right(
  tmp_path: Path, name: str, protocol: str, before: Any, zig: Any, zag: Any
) -> None:
  formats.WRITERS[name](tmp_path)
  out, engine = tmp_path / "out", Scripted(texts=["ZAG", "ZIG"])
  task = TASKS[name](tmp_path, protocol)
  half = run.run(task, engine, out, part=Part(0, 2))
  assert half.missing
  first = run.run(task, engine, out, part=Part(1, 2))
  assert first.interval is None
  assert [r["verdict"] for r in by_id(out).values()] == [before] * len(engine.asked)
  asked = len(engine.asked)
  scores = run.finish(TASKS[name](tmp_path, protocol, judge=judge), out)
  assert len(engine.asked) == asked
  told = {r["text"]: r["verdict"] for r in by_id(out).values()}
  assert told == {"ZIG": zig, "ZAG": zag}
  assert 0.5 <= scores.interval.mean <= 1.0
  assert "verdicts" not in json.loads((out / scores_lib.FILE).read_text())
  text = (out / page.FILE).read_text()
  assert "Wrong answers" in text
  assert "Right answers" in text
  zigs = sum(r["text"] == "ZIG" for r in by_id(out).values())
  other = tmp_path / "other"
  run.run(TASKS[name](tmp_path, protocol, judge=judge), Scripted(texts=["ZAG"]), other)
  flips = compare.compare(other, out)  # the parts in `out` still hold the verdicts of before
  assert (len(flips.fixed), len(flips.broken)) == (0, zigs)


def test_a_judge_that_comes_later_reads_what_no_rule_could(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Without one, MMBench's rules count an answer as wrong that they cannot read."""
  formats.mmbench(tmp_path)
  for name in ("submission", "check_submission"):  # they need the extra xlsx
    monkeypatch.setattr(MmBench, name, lambda *_: [])
  out = tmp_path / "out"
  task = TASKS["mmbench"](tmp_path, "lmms")
  alone = run.run(task, Scripted(texts=["ZIG"]), out)
  assert (alone.headline, alone.interval) == (0.0, None)  # one image
  scores = run.finish(TASKS["mmbench"](tmp_path, "lmms", judge=judge), out)
  assert scores.headline == pytest.approx(1 / 3)  # "B" is right once
  assert [r["verdict"] for r in by_id(out).values()] == [
    {"score": float(right), "read": "B"} for right in (True, False, False)
  ]


def test_what_a_judge_left_out_is_said_beside_the_headline(tmp_path: Path) -> None:
  formats.mmvet(tmp_path)
  out = tmp_path / "out"

  def half(ask: Ask) -> str:
    if "Where?" in ask.prompt:
      raise OSError("down")
    return "1.0"

  def down(ask: Ask) -> str:
    raise OSError("down")

  scores = run.run(TASKS["mmvet"](tmp_path, judge=half), Scripted(), out)
  assert tables.coverage(scores).startswith("Over 2 of 3 questions; 1 unjudged: the judge failed")
  assert tables.headline(scores) == "100.0 mean grade, %"
  none = run.finish(TASKS["mmvet"](tmp_path, judge=down), out)
  assert tables.headline(none).startswith("no score: the judge failed for all of 3 answers (sub")
  assert tables.coverage(none).startswith("Over 0 of 3 questions; 3 unjudged")
  server = run.finish(TASKS["mmvet"](tmp_path), out)
  assert tables.headline(server).startswith("scored by MM-Vet's evaluator")


LATER = {
  "gqa": "gqa/data/testdev_balanced_questions.json",
  "mmvet": "mm-vet/mm-vet.json",
}


@pytest.mark.parametrize("name", LATER)
def test_truths_that_come_later_score_the_answers_that_are_there(tmp_path: Path, name: str) -> None:
  """`--merge` and the same command again; other truths show in a hash of their own."""
  formats.WRITERS[name](tmp_path)
  file, out, engine = tmp_path / LATER[name], tmp_path / "out", Scripted(texts=["left"])
  options: dict[str, Any] = {"judge": judge} if name == "mmvet" else {}
  text = file.read_text()
  file.unlink()
  before = run.run(TASKS[name](tmp_path), engine, out)
  assert before.headline is None
  assert {(r["kind"], r["truth"]) for r in by_id(out).values()} == {("default", None)}
  file.write_text(text)
  merged = run.finish(TASKS[name](tmp_path, **options), out)
  again = run.run(TASKS[name](tmp_path, **options), engine, out)
  assert len(engine.asked) == 3
  assert merged.headline == again.headline == {"gqa": 1 / 3, "mmvet": 50.0}[name]
  assert all(r["truth"] and r["kind"] != "default" for r in by_id(out).values())
  assert all("score" in r["verdict"] for r in by_id(out).values())
  assert merged.data_hash == before.data_hash
  file.write_text(text + " ")
  other = run.finish(TASKS[name](tmp_path, **options), out)
  assert other.figures["truths_hash"] != merged.figures["truths_hash"]
