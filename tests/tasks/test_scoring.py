"""Thousands of generated answers through the scorers and through oracles written from the rules."""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from llava_sp_jax.tasks import scoring
from llava_sp_jax.tasks.mme import PARTS, Mme
from llava_sp_jax.tasks.pope import Pope
from llava_sp_jax.tasks.scienceqa import ScienceQa
from llava_sp_jax.tasks.task import Prediction
from tests.tasks import formats
from tests.tasks.contractions import OFFICIAL

WORDS = [
  "yes",
  "Yes",
  "no",
  "No",
  "NO",
  "not",
  "nope",
  "A",
  "B",
  "c",
  "D",
  "E.",
  "(A)",
  "a",
  "an",
  "The",
  "the",
  "two",
  "TEN",
  "none",
  "zero",
  "3",
  "1,000",
  "7:30",
  "$3.50",
  ".5",
  "5.",
  "n.y.",
  "p/q",
  "red",
  "Red",
  "stop-sign",
  "it's",
  "what's",
  "dont",
  "Im",
  "couldntve",
  "couldn'tve",
  "'ows'at",
  "somebody'd",
  "twas",
  "café",
  "x=y",
  "semi;colon",
  "[b]",
  "{c}",
  '"q"',
  "back\\slash",
  "`t`",
  "under_score",
  "a+b",
  "<i>",
  "hello!",
  "why?",
  "The answer is A.",
  "The answer is B",
  "the answer is C.",
  "Answer: D",
  "A. ",
  "B. because",
  "yes,",
  "no.",
  "noon",
  "know",
  "y",
  "n",
]
GAPS = [" ", " ", " ", "  ", "\n", "\t", "", ", ", ". ", "."]


def generated(seed: int, count: int) -> Iterator[str]:
  """Answers of none to six pieces with odd blanks and marks between; some are single marks' runs."""
  rng = random.Random(seed)
  yield from ("", " ", ".", "a. " * 40 + "b", "." * 40 + "x")
  for _ in range(count):
    text = ""
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
      text += rng.choice(WORDS) + rng.choice(GAPS)
    yield text if rng.random() < 0.5 else text.strip()


@functools.cache
def normal_by_rule(text: str) -> str:
  """The processor's steps as mmf describes them, letter by letter and without a regular expression."""
  text = text.lower()
  text = "".join(c for c in text if c not in ",?")
  text = " 's".join(text.split("'s")).strip()
  text = "".join(" " if c in "\n\t" else c for c in text).strip()
  neighbors: dict[str, set[str]] = {}
  for i, c in enumerate(text):
    neighbors.setdefault(c, set()).update(text[max(0, i - 1) : i], text[i + 1 : i + 2])
  marks = set(';/[]"{}()=+\\_->' + "<@`!")
  out = "".join(("" if " " in neighbors[c] else " ") if c in marks else c for c in text)
  kept, dropped = [], 0
  for i, c in enumerate(out):
    if c == "." and not out[i + 1 : i + 2].isdigit() and dropped < 32:
      dropped += 1
    else:
      kept.append(c)
  numbers = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
  words = [
    "0" if w == "none" else str(numbers.index(w)) if w in numbers else w
    for w in "".join(kept).split()
  ]
  return " ".join(OFFICIAL.get(w, w) for w in words if w not in {"a", "an", "the"})


def test_the_table_of_contractions_is_the_official_one() -> None:
  reachable = {k: v for k, v in OFFICIAL.items() if k == k.lower() and k != v}
  assert reachable == scoring.MENDED


def test_normalizing_follows_the_rule() -> None:
  changed = 0
  for text in generated(1, 6000):
    assert scoring.vqa_normal(text) == normal_by_rule(text), repr(text)
    changed += scoring.vqa_normal(text) != text
  assert changed > 3000


def test_soft_accuracy_follows_the_rule() -> None:
  """The official definition: the mean over all subsets of nine humans of min(matches / 3, 1)."""
  rng, seen = random.Random(2), set()
  for _ in range(3000):
    pool = [rng.choice(WORDS) for _ in range(rng.choice((1, 2, 3, 4)))]
    humans = [rng.choice(pool) for _ in range(10)]
    text = rng.choice([*pool, "other"])
    mine = normal_by_rule(text)
    shares = [
      min(Fraction(sum(normal_by_rule(h) == mine for h in nine), 3), Fraction(1))
      for nine in itertools.combinations(humans, 9)
    ]
    expected = sum(shares, Fraction(0)) / len(shares)
    ours = scoring.vqa_accuracy(text, humans)
    assert ours == pytest.approx(float(expected), abs=1e-12), (text, humans)
    seen.add(expected)
  assert seen == {Fraction(v, 10) for v in (0, 3, 6, 9, 10)}
  with pytest.raises(ValueError, match="no human answers"):
    scoring.vqa_accuracy("x", [])


def pope_by_rule(text: str) -> str:
  """No, if the part before the first period has No, no or not between blanks; commas do not count."""
  first = re.split(r"\.", text, maxsplit=1)[0].replace(",", "")
  return "no" if re.search(r"(?:^| )(?:No|no|not)(?= |$)(?!\n)", first) else "yes"


def test_pope_follows_the_rule(tmp_path: Path) -> None:
  seen = set()
  for text in generated(3, 5000):
    assert scoring.pope_answer(text) == pope_by_rule(text), repr(text)
    seen.add(pope_by_rule(text))
  assert seen == {"yes", "no"}
  formats.pope(tmp_path)
  task = Pope(tmp_path)
  items, texts = task.items(), list(generated(4, 3000))
  for start in range(0, 2400, 12):
    told = dict(zip((i.id for i in items), texts[start : start + 12], strict=True))
    scores = task.score(items, {k: Prediction(k, t) for k, t in told.items()})
    f1s = []
    for split in ("adversarial", "popular", "random"):
      mine = [i for i in items if i.kind == split]
      said = {i.id for i in mine if pope_by_rule(told[i.id]) == "yes"}
      true = {i.id for i in mine if i.truth == "yes"}
      row = scores.by_kind[split]
      assert row["accuracy"] == 1 - len(said ^ true) / len(mine)
      assert row["yes_ratio"] == len(said) / len(mine)
      f1s.append(2 * len(said & true) / (len(said) + len(true)))
      assert row["f1"] == pytest.approx(f1s[-1])
    assert scores.headline == pytest.approx(sum(f1s) / 3)


def test_scienceqa_letters_follow_the_rule(tmp_path: Path) -> None:
  formats.scienceqa(tmp_path)
  task = ScienceQa(tmp_path)
  items, seen = task.items(), set()
  for number, text in enumerate(generated(5, 6000)):
    if re.fullmatch(r"[A-E]|[A-E]\. (?s:.*)", text):
      read = text[0]
    else:
      pieces = text.split("The answer is ")[1:]
      named = [p[0] for p in pieces if re.match(r"[A-Z][^\n]", p)]
      read = named[0] if len(named) == 1 else "FAILED"
    item = items[number % len(items)]
    verdict = task.verdict(item, text)
    assert verdict["read"] == read, repr(text)
    beyond = read == "FAILED" or ord(read) - ord("A") >= item.extra["choices"]
    assert verdict["index"] == (-1 if beyond else "ABCDE".index(read))
    assert verdict["score"] == (not beyond and read == item.truth)
    seen.add(read)
  assert {"A", "B", "FAILED"} <= seen


def test_mme_pairs_follow_the_rule(tmp_path: Path) -> None:
  """Score of a subtask: % of right answers plus % of images with both right; of a part: the sum."""
  formats.mme(tmp_path)
  task = Mme(tmp_path)
  items, texts = task.items(), list(generated(6, 3000))
  assert len(items) == 12
  plus = set()
  for start in range(0, 2400, 12):
    told = texts[start : start + 12]
    if start % 5 == 0:  # right ones are rare among such answers
      told = [
        i.truth + "." if (n + start) % 7 else t
        for n, (i, t) in enumerate(zip(items, told, strict=True))
      ]
    right = []
    for item, text in zip(items, told, strict=True):
      start_of_text = text[:4].lower()
      read = ["other", "no"]["no" in start_of_text] if "yes" not in start_of_text else "yes"
      right.append(read == item.truth.lower())
    given = {i.id: Prediction(i.id, t) for i, t in zip(items, told, strict=True)}
    scores = task.score(items, given)
    totals = {}
    for place, kind in enumerate(("artwork", "count", "code_reasoning")):
      four = right[4 * place : 4 * place + 4]
      pairs = (four[0] and four[1]) + (four[2] and four[3])
      totals[kind] = 25.0 * sum(four) + 50.0 * pairs
      assert scores.by_kind[kind]["score"] == totals[kind]
      plus.add(pairs)
    assert scores.headline == totals["artwork"] + totals["count"]
    assert scores.figures["cognition"] == totals["code_reasoning"]
    assert scores.figures["total"] == sum(totals.values())
  assert plus == {0, 1, 2}
  assert {len(kinds) for kinds in PARTS.values()} == {10, 4}
