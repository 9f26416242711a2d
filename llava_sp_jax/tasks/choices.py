"""Writes and reads multiple-choice questions, and computes MMBench's circular score."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from llava_sp_jax.tasks.benchmark import ratio
from llava_sp_jax.tasks.judge import Ask, Reviews
from llava_sp_jax.tasks.scoring import choice
from llava_sp_jax.tasks.task import Item, Predictions, text_of

TURNS = 3  # attempts to get a letter from the judge

# The judge's prompt of MMBench. Scores depend on its exact words.
PROMPT = (
  "You are an AI assistant who will help me to match an answer with several options of a "
  "single-choice question. You are provided with a question, several options, and an answer, and "
  "you need to find which option is most similar to the answer. If the meaning of all options are "
  "significantly different from the answer, output E. Your should output a single uppercase "
  "character in A, B, C, D (if they are valid options), and E. \n"
  "Example 1: \nQuestion: What is the main object in image?\n"
  "Options: A. teddy bear B. rabbit C. cat D. dog\nAnswer: a cute teddy bear\nYour output: A\n"
  "Example 2: \nQuestion: What is the main object in image?\n"
  "Options: A. teddy bear B. rabbit C. cat D. dog\nAnswer: Spider\nYour output: E\n"
  "Example 3: \nQuestion: {question}?\nOptions: {options}\nAnswer: {answer}\nYour output: "
)


# The values that pandas.read_table, with which LLaVA reads the file, takes for an empty cell.
EMPTY = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
         "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}  # fmt: skip


def empty(text: str) -> bool:
  """Returns whether the original, which reads with pandas, takes a cell for an empty one."""
  return text in EMPTY or text.lower() in ("nan", "none")


def of_llava(request: str) -> Callable[..., str]:
  """Returns a function that writes LLaVA's prompt from a row and its options.

  The prompt has hint, question, lines `A. ...`, and `request`, which asks for a letter.
  """

  def prompt(row: dict[str, str], options: dict[str, str]) -> str:
    hint = [] if empty(row["hint"]) else [row["hint"]]
    lines = [f"{letter}. {text}" for letter, text in options.items()]
    return "\n".join([*hint, row["question"], *lines, request])

  return prompt


def of_lmms(begin: str, request: str) -> Callable[..., str]:
  """Returns a function that writes lmms-eval's prompt from a row and its options.

  The prompt has hint, question and `begin` in one line, lines `A. ...`, an empty line, and
  `request`.
  """

  def prompt(row: dict[str, str], options: dict[str, str]) -> str:
    hint = "" if empty(row["hint"]) else f"{row['hint']} "
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return f"{hint}{row['question']} {begin}\n{lines}\n\n{request}"

  return prompt


@dataclasses.dataclass(frozen=True)
class CircularScore:
  """Holds the result of `circular_score`."""

  by_kind: dict[str, dict[str, float]]  # over groups: accuracy, items, asked
  figures: dict[str, Any]  # counts of groups without a result, and the judge's reviews
  verdicts: dict[str, dict[str, Any]]  # by item id, of the answers that the judge read


def circular_score(
  items: list[Item],
  predictions: Predictions,
  verdict: Callable[[Item, str], dict[str, Any]],
  judge: Reviews | None,
) -> CircularScore:
  """Computes the circular score: the share of groups of which every answer is right.

  A group is one question with all orders of its options. A group with a wrong answer is wrong and
  needs no judge. A group is not counted if it has a missing answer, an answer that the judge failed
  to read (the original draws an option at random instead), or an item with a problem.

  `verdict` scores an answer by rules alone, without `score` if a judge has to read it.
  """
  groups: dict[int | str, list[Item]] = {}
  for item in items:
    groups.setdefault(item.extra["group"], []).append(item)
  by_kind: dict[str, dict[str, float]] = {}
  counts, reviews = {"unanswered": 0, "unjudged": 0}, []
  verdicts = {}
  for members in groups.values():
    right: bool | None = None
    texts = [text_of(predictions, item) for item in members]
    found = [verdict(i, t) for i, t in zip(members, texts, strict=True) if t is not None]
    if any(item.problem for item in members):
      pass  # cannot be scored
    elif any(v.get("score") == 0 for v in found):
      right = False
    elif None in texts:
      counts["unanswered"] += 1
    else:
      right = True
      for item, text, known in zip(members, texts, found, strict=True):
        if "score" in known or not right:
          continue
        assert judge is not None
        letter, new = judged(item, text or "", judge)
        reviews += new
        right = letter == item.truth if letter else None
        if letter:
          verdicts[item.id] = {"score": float(letter == item.truth), "read": letter}
      counts["unjudged"] += right is None
    for kind in dict.fromkeys(("all", members[0].kind)):
      row = by_kind.setdefault(kind, {"right": 0, "items": 0, "asked": 0})
      row["right"] += bool(right)
      row["items"] += right is not None
      row["asked"] += 1
  table = {
    kind: {"accuracy": ratio(r["right"], r["items"]), "items": r["items"], "asked": r["asked"]}
    for kind, r in by_kind.items()
  }
  return CircularScore(table, {**counts, "reviews": reviews}, verdicts)


def judged(item: Item, text: str, judge: Reviews) -> tuple[str, list[dict[str, str]]]:
  """Asks a judge, up to three times, for the option that an answer names.

  Returns: its letter ("" if the judge failed), and the judge's replies as {id, text, error}.
  """
  options = "".join(f"{letter}. {option}\n" for letter, option in item.extra["options"].items())
  prompt = PROMPT.format(
    question=item.extra["asked"], options=f"There are several options: \n{options}", answer=text
  )
  reviews = []
  for turn in range(TURNS):
    review = judge(
      Ask(prompt=prompt, max_tokens=256, turn=turn),
      lambda reply: choice(reply, item.extra["options"]) or None,
    )
    reviews.append({"id": item.id, "text": review.text, "error": review.error})
    letter = choice(review.text, item.extra["options"]) if not review.error else ""
    if letter:
      return letter, reviews
  return "", reviews
