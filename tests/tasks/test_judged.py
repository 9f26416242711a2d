"""Benchmarks that a judge reads: MMBench, LLaVA-Bench, MM-Vet."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_sp_jax.tasks.judge import Ask
from llava_sp_jax.tasks.llava_bench import LlavaBench, pair
from llava_sp_jax.tasks.mmbench import MmBench
from llava_sp_jax.tasks.mmvet import MmVet, grade
from llava_sp_jax.tasks.task import Prediction
from tests.tasks.formats import answers


class Scripted:
  """A judge whose answers are a function of the asking; it remembers them."""

  name = "scripted"

  def __init__(self, answer: Callable[[Ask], str]):
    self.answer, self.asked = answer, list[Ask]()

  def __call__(self, ask: Ask) -> str:
    self.asked.append(ask)
    return self.answer(ask)


def failing(ask: Ask) -> str:
  raise OSError("down")


def test_mmbench_s_judge_reads_what_no_rule_can(root: Path) -> None:
  judge = Scripted(lambda ask: "E" if "an odd one" in ask.prompt else "B")
  task = MmBench(root, "lmms", judge=judge)
  items = task.items()
  texts = {"3": "the barking pet", "5": "an odd one", "9": "D"}
  given = {k: Prediction(k, t) for k, t in texts.items()}
  assert task.verdict(items[0], texts["3"]) == {"read": ""}
  scores = task.score(items, given)
  assert scores.headline == 2 / 3
  assert len(judge.asked) == 2  # the third needed none
  assert 'Question: what is "it"??\nOptions: There are several options: \nA. cat' in (
    judge.asked[0].prompt
  )
  assert [r["text"] for r in scores.figures["reviews"]] == ["B", "E"]
  for bad in (Scripted(failing), Scripted(lambda ask: "I cannot tell")):
    task = MmBench(root, "lmms", judge=bad)
    scores = task.score(items, given)
    assert scores.by_kind["all"] == {"accuracy": 1.0, "items": 1, "asked": 3}
    assert scores.figures["unjudged"] == 2
    assert len(bad.asked) == 6
    nothing = task.score(items[:2], {k: given[k] for k in ("3", "5")})
    assert nothing.headline is None
    assert nothing.metric == "no score: the judge failed for all of 2 answers"
  alone = MmBench(root, "lmms")
  assert alone.score(items, given).headline == 1 / 3
  assert alone.protocol.endswith("no judge")


def test_llava_bench_compares_means(root: Path, tmp_path: Path) -> None:
  said = {"0": "8 6\nwell", "1": "10, 5", "2": "9 9", "3": "7 8\n"}

  def answer(ask: Ask) -> str:
    number = next(k for k in said if f"What {k}?" in ask.prompt)
    return said[number]

  judge = Scripted(answer)
  task = LlavaBench(root, judge=judge, reviews=tmp_path / "reviews.jsonl")
  items = task.items()
  scores = task.score(items, answers(items, "mine"))
  # "10, 5" has two blanks between its numbers once the comma is one, and is refused by the original
  assert scores.figures["unjudged"] == 1
  assert scores.by_kind["all"] == {
    "score": round(round(23 / 3, 3) / 8.0 * 100, 1),
    "reference": 8.0,
    "model": round(23 / 3, 3),
    "items": 3,
    "asked": 4,
  }
  assert scores.by_kind["conv"]["score"] == round(7 / 7.5 * 100, 1)
  assert scores.by_kind["detail"]["items"] == 0
  assert scores.headline == scores.by_kind["all"]["score"]
  assert "judge scripted" in task.protocol
  ask = judge.asked[0]
  assert ask.temperature == 0.2
  assert ask.prompt.startswith(
    "[Context]\nA cat.\nOn a mat.\n\n[Question]\nWhat 0?\n\n[Assistant 1]\ntruth 0\n\n"
    "[End of Assistant 1]\n\n[Assistant 2]\nmine\n\n[End of Assistant 2]\n\n[System]\nWe would"
  )
  again = LlavaBench(root, judge=Scripted(failing), reviews=tmp_path / "reviews.jsonl")
  assert again.score(items, answers(items, "mine")).headline == scores.headline  # kept answers
  said["1"] = "10 5"  # the judge that was not understood is asked again, the others are not
  later = Scripted(answer)
  task = LlavaBench(root, judge=later, reviews=tmp_path / "reviews.jsonl")
  better = task.score(items, answers(items, "mine"))
  assert (better.figures["unjudged"], len(later.asked)) == (0, 1)
  assert task.score(items, answers(items, "mine")) == better
  assert len(later.asked) == 1
  down = LlavaBench(root, judge=Scripted(failing)).score(items, answers(items, "mine"))
  assert down.headline is None
  assert down.metric == "no score: the judge failed for all of 4 answers"
  assert down.figures["unjudged"] == 4
  assert down.figures["reviews"][0]["error"] == "OSError: down"


def test_mmvet_s_grades(root: Path) -> None:
  def answer(ask: Ask) -> str:
    if "Where?" in ask.prompt:
      return "perhaps"
    if "Who?" in ask.prompt and ask.turn == 0:
      return "Score: 1"
    return "0.5" if "What is x?" in ask.prompt else "1.0 yes"

  judge = Scripted(answer)
  task = MmVet(root, judge=judge)
  items = task.items()
  scores = task.score(items, answers(items, "x=-1"))
  assert scores.headline == 75.0
  assert scores.by_kind["all"] == {"score": 75.0, "items": 2, "asked": 3}
  assert scores.by_kind["math+ocr"]["score"] == 50.0
  assert scores.figures["capability rec"] == {"score": 100.0, "items": 1}
  assert scores.figures["unjudged"] == 1
  assert [(a.turn, a.temperature) for a in judge.asked] == [
    (0, 0),
    (0, 0),
    (1, 0),
    (0, 0),
    (1, 0),
    (2, 0.5),
    (3, 1.0),
    (4, 1.5),
  ]
  down = MmVet(root, judge=Scripted(failing)).score(items, answers(items, "x"))
  assert down.headline is None
  assert down.metric == "no score: the judge failed for all of 3 answers"
  assert task.score(items, {}).metric == "no score: there is no answer"
  assert down.figures["unjudged"] == 3


@pytest.mark.parametrize(
  ("protocol", "digest", "end", "again", "temperatures", "tokens"),
  [
    (
      "llava",
      "d1b3e0a5b4e72c88",
      "x=-1 | ",
      "\nPredict the correctness of the answer (digit): ",
      [0, 0, 0.5, 1.0, 1.5],
      3,
    ),
    ("lmms", "4d9b806e960fcd3f", "x=-1 |", "", [0, 0.5, 1.0, 1.5], 128),
  ],
)
def test_mmvet_s_graders_word_for_word(
  root: Path,
  protocol: str,
  digest: str,
  end: str,
  again: str,
  temperatures: list[float],
  tokens: int,
) -> None:
  """Hashes of `prompt` in MM-Vet's mm-vet_evaluator.py and of MM_VET_PROMPT in lmms-eval."""
  judge = Scripted(lambda ask: "no number")
  task = MmVet(root, protocol, judge=judge)
  item = task.items()[0]
  task.score([item], answers([item], "x=-1"))
  first, *later = judge.asked
  prompt, _, question = first.prompt.rpartition("\n")
  assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == digest
  assert question == f"What is x? | -1 <AND> -5 | {end}"
  assert {ask.prompt for ask in later} == {first.prompt + again}
  assert [ask.temperature for ask in judge.asked] == temperatures
  assert {ask.max_tokens for ask in judge.asked} == {tokens}


def test_a_judge_of_mmvet_needs_the_truths(own: Path) -> None:
  (own / "mm-vet/mm-vet.json").unlink()
  assert len(MmVet(own).items()) == 3
  with pytest.raises(FileNotFoundError, match=r"mm-vet.json; the judge compares with it"):
    MmVet(own, judge=failing)


@pytest.mark.parametrize(
  ("review", "scores"),
  [("8 7", (8.0, 7.0)), ("8,7\nx", (8.0, 7.0)), ("8 7 6", None), ("8", None), ("a b", None),
   ("", None), ("nan 7", None), ("8 inf\nx", None)],
)  # fmt: skip
def test_two_scores_in_the_first_line(review: str, scores: tuple[float, float] | None) -> None:
  assert pair(review) == scores


@pytest.mark.parametrize(
  ("review", "value"),
  [
    ("0.4", 0.4),
    ("1.0 right", 1.0),
    (" 1.0", None),
    ("1.1", None),
    ("-0.1", None),
    ("nan", None),
    ("x", None),
  ],
)
def test_a_grade_from_0_to_1(review: str, value: float | None) -> None:
  assert grade(review) == value
