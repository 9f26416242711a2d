"""A judge's answers are kept; those of no use are asked for again; scores outside the scale are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_sp_jax.tasks import llava_bench, mmvet
from llava_sp_jax.tasks.judge import Ask, Reviews


def test_raw_answers_are_kept_and_failures_asked_again(tmp_path: Path) -> None:
  file, calls = tmp_path / "kept" / "reviews.jsonl", []

  def judge(ask: Ask) -> str:
    calls.append(ask.prompt)
    if ask.prompt == "bad" and calls.count("bad") == 1:
      raise ValueError("no")
    return f"raw {ask.prompt}"

  first = Reviews(judge, file)
  assert first(Ask(prompt="good")).text == "raw good"
  failed = first(Ask(prompt="bad"))
  assert (failed.text, failed.error) == ("", "ValueError: no")
  file.write_text(file.read_text() + '{"key": "torn')  # a run that was killed while writing
  second = Reviews(judge, file)
  assert second(Ask(prompt="good")).text == "raw good"
  assert second(Ask(prompt="bad")).text == "raw bad"
  assert calls == ["good", "bad", "bad"]
  third = Reviews(judge, file)
  assert third(Ask(prompt="bad")).text == "raw bad"
  assert third(Ask(prompt="bad", turn=1)).text == "raw bad"
  assert calls == ["good", "bad", "bad", "bad"]  # another turn is another question


def test_an_answer_of_no_use_is_asked_for_once_more_in_each_run(tmp_path: Path) -> None:
  said, calls = iter(["well, ...", "hm", "7"]), []

  def judge(ask: Ask) -> str:
    calls.append(ask)
    return next(said)

  def reads(text: str) -> int | None:
    return int(text) if text.isdigit() else None

  for run, wanted in enumerate(["well, ...", "hm", "7", "7"]):
    reviews = Reviews(judge, tmp_path / "reviews.jsonl")
    for _ in range(3):
      assert reviews(Ask(prompt="p"), reads).text == wanted
    assert len(calls) == min(run + 1, 3)


def test_another_judge_s_answers_are_not_taken(tmp_path: Path) -> None:
  def one(ask: Ask) -> str:
    return "1"

  def two(ask: Ask) -> str:
    return "2"

  for judge in (one, two):
    review = Reviews(judge, tmp_path / "reviews.jsonl")(Ask(prompt="p"))
    assert review.text == judge(Ask(prompt="p"))


@pytest.mark.parametrize(
  "said",
  [
    "85 90",
    "-1 -1",
    "8 11",
    "8 nan",
    "8 1_0",
    "8 \u0669",
    "inf 8",
    "<html>",
    "8",
    "8 9 7",
    "",
    "8/9",
  ],
)
def test_scores_outside_the_scale_are_none(said: str) -> None:
  """Others have counted -1 and numbers beyond the scale as scores."""
  assert llava_bench.pair(said) is None
  assert mmvet.grade(said.replace("8 ", "")) is None
  assert llava_bench.pair("8 9.5\r\nwell") == (8.0, 9.5)
  assert [mmvet.grade(text) for text in ("0.5", "1", "1.1", "-0.1", "0_1")] == [
    0.5,
    1,
    None,
    None,
    None,
  ]
