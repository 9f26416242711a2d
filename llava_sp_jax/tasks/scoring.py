"""Implements scoring rules that several benchmarks share, equal to the originals in every quirk."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence

# Contractions that are restored when one of their apostrophes is missing. From the list of the VQA
# evaluation (github.com/GT-Vision-Lab/VQA), without its capitalized entries, which cannot match,
# since text is lower-cased first.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
MENDED = {
  word[:i] + word[i + 1 :]: word
  for word in CONTRACTIONS.split()
  for i, c in enumerate(word)
  if c == "'"
} | {"somebody'd": "somebodyd"}  # sic
NUMBERS = {
  "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
  "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ("a", "an", "the")
MARKS = ';/[]"{}()=+\\_-><@`!'  # commas and question marks are removed before
HUMANS = 4  # the fewest human answers of the soft accuracy: with fewer no answer can reach 1
PERIODS = 32  # sic: the original passes a flag to re.sub as the count


def vqa_normal(text: str) -> str:
  """Normalizes an answer like EvalAI (the processor of llava/eval/m4c_evaluator.py).

  Removes every occurrence of a mark that is next to a space anywhere in the text, and otherwise
  replaces it by a space. Removes a period unless a digit follows, at most 32 of them. Replaces
  numerals by digits, drops articles, and restores apostrophes of contractions.
  """
  text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
  text = text.replace("\n", " ").replace("\t", " ").strip()
  plain = text
  for mark in MARKS:
    beside_blank = f"{mark} " in text or f" {mark}" in text
    plain = plain.replace(mark, "" if beside_blank else " ")
  plain = re.sub(r"\.(?!\d)", "", plain, count=PERIODS)
  words = [NUMBERS.get(word, word) for word in plain.split()]
  return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(text: str, answers: Sequence[str]) -> float:
  """Returns VQA's soft accuracy of the answer `text`, from 0 to 1.

  For each human answer, counts the equal ones among the other human answers; the accuracy is the
  mean of min(1, count / 3). `answers` are the human answers (ten in VQAv2, TextVQA and VizWiz;
  other numbers are possible).

  Raises: ValueError without answers.
  """
  if not answers:
    raise ValueError("no human answers to compare with; expected ten")
  given = vqa_normal(text)
  same = [vqa_normal(answer) == given for answer in answers]
  total = sum(same)
  if not total:
    return 0.0
  return sum(min(1.0, (total - own) / 3) for own in same) / len(same)


def pope_answer(text: str) -> str:
  """Reads "yes" or "no" from an answer to POPE, like llava/eval/eval_pope.py.

  An answer is "no" if `No`, `no` or `not` is one of its words, up to the first period, without
  commas, and split at single spaces. All others are "yes", also "NO", "isn't" and an empty answer.
  """
  words = text.split(".")[0].replace(",", "").split(" ")
  return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_answer(text: str) -> str:
  """Reads "yes", "no" or "other" from the first four letters (MME's eval_tool/calculation.py)."""
  start = text.lower()[:4]
  return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_answer_lmms(text: str) -> str:
  """Reads an answer to MME like lmms-eval: stripped, without periods; `y` and `n` are accepted."""
  text = text.lower().strip().replace(".", "")
  return {"y": "yes", "n": "no"}.get(text, mme_answer(text))


def sqa_letter(text: str) -> str:
  """Reads the letter of an answer like ScienceQA's scorer (llava/eval/eval_science_qa.py).

  Accepts an answer that is exactly a letter A-E, one that begins with such a letter and ". ", and
  one with exactly one "The answer is X", where X is any capital and any character follows it.
  Returns "FAILED" for all others.
  """
  letters = "ABCDE"
  if len(text) == 1 and text in letters:
    return text
  if len(text) >= 3 and text[0] in letters and text[1:3] == ". ":
    return text[0]
  found = re.findall(r"The answer is ([A-Z]).", text)
  return found[0] if len(found) == 1 else "FAILED"


def sqa_letter_lmms(text: str) -> str:
  """Reads the letter of an answer like lmms-eval's scienceqa.

  Returns the first character if it is a capital that a period follows, and otherwise the whole
  text.
  """
  return text[0] if len(text) >= 2 and text[0].isupper() and text[1] == "." else text


def plain(text: str) -> str:
  """Returns a text in lower case without ASCII punctuation."""
  return text.lower().translate(str.maketrans("", "", string.punctuation))


def plain_match(text: str, answer: str) -> bool:
  """Returns whether two texts are equal without case and ASCII punctuation, but with spaces.

  This is the rule exact_match of lmms-eval.
  """
  return plain(text) == plain(answer)


def relaxed_match(text: str, answer: str, tolerance: float = 0.05) -> bool:
  """Returns whether an answer is right by ChartQA's relaxed correctness (arXiv 2203.10244).

  Two numbers may differ by `tolerance` times the ground truth `answer`; a percent sign divides by
  100. Other texts must be equal without case.
  """
  given, right = _figure(text), _figure(answer)
  if given is not None and right:  # an answer of 0 is compared as text, as in the original
    return abs(given - right) <= tolerance * abs(right)
  return text.lower() == answer.lower()


def _figure(text: str) -> float | None:
  """Returns the number of a text, or None; also for infinities, to which all numbers were close."""
  percent = text.endswith("%")
  try:
    value = float(text.rstrip("%"))
  except ValueError:
    return None
  if not math.isfinite(value):
    return None
  return value / 100 if percent else value


def plain_number(text: str) -> float | None:
  """Returns the value of a decimal number in ASCII with optional whitespace around it, or None.

  Returns None for other texts that `float` accepts: `nan`, `1_0`, exponents, digits of other
  scripts.
  """
  found = re.fullmatch(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*", text, re.ASCII)
  return float(found[1]) if found else None


def anls(text: str, answers: Sequence[str], threshold: float = 0.5) -> float:
  """Returns DocVQA's normalized Levenshtein similarity of a text (arXiv 1905.13648), in [0, 1].

  This is the largest value of 1 - distance / longer length over the answers, without case and with
  whitespace collapsed. A value below `threshold` becomes 0, as in DocVQA's scorer.
  """
  given = " ".join(text.strip().lower().split())
  found = [_similarity(given, " ".join(a.strip().lower().split())) for a in answers]
  best = max(found, default=0.0)
  return best if best >= threshold else 0.0


def _similarity(a: str, b: str) -> float:
  row = list(range(len(b) + 1))  # distances of the read part of `a` to each prefix of `b`
  for i, letter in enumerate(a, 1):
    before, row[0] = row[0], i
    for j, other in enumerate(b, 1):
      before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
  return 1 - row[-1] / max(len(a), len(b), 1)


_AROUND = (
  ("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
  (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip


def choice(text: str, options: dict[str, str]) -> str:
  """Returns the letter of the option that an answer names, or "".

  Uses MMBench's own rules (VLMEvalKit, lmms-eval). Returns the letter of A-E that is the only one
  to occur as a word, bare or with common punctuation around it. A bare letter is ignored in an
  answer of more than three words with the word `A`, which may be an article. Otherwise returns the
  only option whose text the answer contains. `options` maps letters to texts.
  """
  words = set(text.split())
  long = len(text.split()) > 3
  for before, after in _AROUND:
    named = [c for c in "ABCDE" if before + c + after in words]
    if len(named) == 1 and not (not before + after and "A" in words and long):
      return named[0]
  lowered = text.lower()
  held = [c for c, option in options.items() if str(option).lower() in lowered]
  return held[0] if len(held) == 1 else ""
