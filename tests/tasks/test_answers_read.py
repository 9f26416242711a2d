"""How answers are read: options, yes and no, letters; by each protocol's own rule."""

from __future__ import annotations

import pytest

from llava_sp_jax.tasks import scoring


@pytest.mark.parametrize(
  ("text", "letter"),
  [
    ("A", "A"), ("B.", "B"), ("(C)", "C"), ("D)", "D"), ("The answer is (B).", "B"), (":A", "A"),
    ("A dog is here", ""), ("A cat is here", "A"), ("it is a Cat, I think", "A"), ("A or B", ""),
    ("cat and cow", ""), ("", ""), ("E", "E"), ("b", ""), ("B, since it barks", "B"),
    ("A thing B is", ""),
  ],
)  # fmt: skip
def test_options_are_read_by_mmbench_s_rules(text: str, letter: str) -> None:
  """Expected by hand from `can_infer` of VLMEvalKit, whose text rule takes the only option held."""
  assert scoring.choice(text, {"A": "Cat", "B": "bear", "C": "cow"}) == letter


@pytest.mark.parametrize(
  ("text", "llava", "lmms"),
  [("Yes", "yes", "yes"), ("y", "other", "yes"), ("N.", "other", "no"), (" no", "no", "no"),
   ("\n\n\n\nno", "other", "no"), ("know it", "no", "no"), ("maybe", "other", "other")],
)  # fmt: skip
def test_mme_is_read_differently_by_the_two(text: str, llava: str, lmms: str) -> None:
  assert (scoring.mme_answer(text), scoring.mme_answer_lmms(text)) == (llava, lmms)


@pytest.mark.parametrize(
  ("text", "llava", "lmms"),
  [("A", "A", "A"), ("A. x", "A", "A"), ("A.x", "FAILED", "A"), ("The answer is A.", "A", "T"),
   ("Q. x", "FAILED", "Q"), ("b", "FAILED", "b")],
)  # fmt: skip
def test_scienceqa_is_read_differently_by_the_two(text: str, llava: str, lmms: str) -> None:
  lmms = text if lmms == "T" else lmms
  assert (scoring.sqa_letter(text), scoring.sqa_letter_lmms(text)) == (llava, lmms)


def test_exact_match_without_case_and_punctuation() -> None:
  assert scoring.plain_match("T-Shirt.", "t-shirt")
  assert scoring.plain_match("tshirt", "T-shirt")
  assert not scoring.plain_match("red ", "red")
