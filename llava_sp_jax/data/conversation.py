"""Conversation templates: turns become pieces of text that know whether they are learned.

A piece is text of one role; answers and their end marks are learned, everything else is context.
Labels are born here, turn by turn, and never searched for in the finished prompt.
Source: `llava/conversation.py`, `preprocess*` in `llava/train/train.py` of the original code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

IMAGE = "<image>"


class SampleError(ValueError):
  """One sample that cannot be used; the message says what was expected."""


@dataclasses.dataclass(frozen=True)
class Template:
  """The text around the turns: system, `before` question `after` + `answer` reply `end`."""

  system: str
  before: str
  after: str
  answer: str
  end: str
  image_only: bool = False  # the question is reduced to its image


TEMPLATES = {
  "plain": Template("", "", "", "", "\n", image_only=True),
  "v1": Template(
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
    "USER: ", " ASSISTANT:", " ", "</s>",
  ),
  "smollm2": Template(
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n",
    "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "", "<|im_end|>\n",
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Piece:
  text: str
  learn: bool
  branch: int  # 0 is the trunk, which every branch sees


def turns_of(sample: Any) -> list[tuple[str, str | None]]:
  """The (question, reply) pairs of LLaVA's `conversations` list; an open last turn has reply None.

  Raises:
    SampleError: when the turns do not alternate human, gpt.
  """
  messages = sample.get("conversations")
  if not isinstance(messages, list) or not messages:
    raise SampleError("`conversations` must be a list of {from, value} with at least one turn")
  pairs: list[tuple[str, str | None]] = []
  for i, message in enumerate(messages):
    wanted = ("human", "gpt")[i % 2]
    known = message if isinstance(message, dict) else {}
    if known.get("from") != wanted or not isinstance(known.get("value"), str):
      raise SampleError(f"turn {i}: expected a text from {wanted!r}, found {message!r:.80}")
    if i % 2:
      pairs[-1] = (pairs[-1][0], message["value"])
    else:
      pairs.append((message["value"], None))
  return pairs


def image_first(question: str) -> str:
  """Images of a turn go to its front, each on a line of its own, as LLaVA's data expects."""
  count = question.count(IMAGE)
  return (IMAGE + "\n") * count + question.replace(IMAGE, "").strip() if count else question


def chain(turns: list[tuple[str, str | None]], template: Template) -> list[Piece]:
  """One dialogue: every turn sees the turns before it."""
  pieces = [Piece(template.system, False, 0)]
  for question, reply in turns:
    asked = IMAGE * question.count(IMAGE) if template.image_only else image_first(question)
    pieces.append(Piece(template.before + asked + template.after, False, 0))
    pieces += _reply(reply, template, 0)
  return pieces


def branch(turns: list[tuple[str, str | None]], template: Template) -> list[Piece]:
  """Every turn alone with the image, as if it were a sample of its own, at the price of one image.

  Raises:
    SampleError: when the image does not stand in the first turn only.
  """
  first, *others = (question for question, _ in turns)
  if first.count(IMAGE) != 1 or any(IMAGE in q for q in others):
    raise SampleError("branched turns need exactly one <image>, in the first turn")
  pieces = [Piece(template.system + template.before + IMAGE, False, 0)]
  for i, (question, reply) in enumerate(turns):
    asked = image_first(IMAGE + question.replace(IMAGE, "")).removeprefix(IMAGE)
    pieces.append(Piece(asked + template.after, False, i + 1))
    pieces += _reply(reply, template, i + 1)
  return pieces


def _reply(reply: str | None, template: Template, segment: int) -> list[Piece]:
  return [] if reply is None else [Piece(template.answer + reply + template.end, True, segment)]


TURNS = {"chain": chain, "branch": branch}


def prompt(question: str, template: Template) -> list[Piece]:
  """The pieces of one open question, ready for an answer."""
  return chain([(question, None)], template)
