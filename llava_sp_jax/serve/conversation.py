"""Turns the messages of a client into a conversation, and that into a request to the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from llava_sp_jax.data.conversation import IMAGE
from llava_sp_jax.infer.requests import Request
from llava_sp_jax.serve import protocol
from llava_sp_jax.serve.errors import ApiError


@dataclasses.dataclass(frozen=True)
class Link:
  """Holds a picture as the client sent it: a URL or base64; `param` names the field it stood in."""

  url: str
  param: str


@dataclasses.dataclass(frozen=True)
class Turn:
  """Holds what one side said: texts and pictures, in their order."""

  role: Literal["user", "assistant"]
  pieces: tuple[str | Link, ...]

  @property
  def marked(self) -> str:
    """Returns the pieces on lines of their own, with `<image>` for a picture."""
    return "\n".join(piece if isinstance(piece, str) else IMAGE for piece in self.pieces)

  @property
  def text(self) -> str:
    """Returns `marked`, without marks if the pictures come first.

    That is where a question without marks has its pictures.
    """
    texts = [piece for piece in self.pieces if isinstance(piece, str)]
    count = len(self.pieces) - len(texts)
    if all(isinstance(piece, Link) for piece in self.pieces[:count]):
      return "\n".join(texts)
    return self.marked


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Holds a system text, and turns that alternate; the first and the last are the user's."""

  system: str | None
  turns: tuple[Turn, ...]

  @property
  def links(self) -> tuple[tuple[str, str], ...]:
    """Returns (URL, field) of all pictures, in their order."""
    pieces = (piece for turn in self.turns for piece in turn.pieces)
    return tuple((p.url, p.param) for p in pieces if isinstance(p, Link))

  def request(self, images: Sequence[bytes]) -> Request:
    """Returns the request to the engine; `images` are the encoded pictures of `links`.

    With several turns, every picture has its mark, because it belongs to one of them.
    """
    if len(self.turns) == 1:
      return Request(self.turns[0].text, tuple(images), self.system)
    *before, last = [turn.marked for turn in self.turns]
    history = tuple(zip(before[::2], before[1::2], strict=True))
    return Request(last, tuple(images), self.system, history=history)


def of(messages: Sequence[protocol.Message]) -> Conversation:
  """Returns the conversation of messages; neighbors of one role become one turn.

  Raises: ApiError when a system message does not come first, the turns do not begin and end with
    the user's, or a text has the mark of a picture.
  """
  system: list[str] = []
  turns: list[Turn] = []
  for i, message in enumerate(messages):
    pieces = _pieces(message, f"messages[{i}].content")
    if isinstance(message, protocol.SystemMessage | protocol.DeveloperMessage):
      if turns:
        raise _misplaced(i, "a system message comes after others; send it first")
      system += [piece for piece in pieces if isinstance(piece, str)]
      continue
    role: Literal["user", "assistant"] = (
      "user" if isinstance(message, protocol.UserMessage) else "assistant"
    )
    if not turns and role == "assistant":
      raise _misplaced(i, "an answer has no question; send the user's message before it")
    if turns and turns[-1].role == role:
      pieces = turns.pop().pieces + pieces
    turns.append(Turn(role, pieces))
  if not turns or turns[-1].role == "assistant":
    raise _misplaced(len(messages) - 1, "the last message is not the user's; add the question")
  return Conversation("\n".join(system) if system else None, tuple(turns))


def of_prompt(text: str) -> Conversation:
  """Returns the conversation of one question without pictures.

  Raises: ApiError when the text has the mark of a picture.
  """
  return Conversation(None, (Turn("user", (_unmarked(text, "prompt"),)),))


def _misplaced(i: int, message: str) -> ApiError:
  return ApiError("invalid_value", message, f"messages[{i}].role")


def _pieces(message: protocol.Message, param: str) -> tuple[str | Link, ...]:
  content = message.content
  parts = [protocol.TextPart(content)] if isinstance(content, str) else content
  return tuple(
    Link(part.image_url.url, f"{param}[{i}].image_url.url")
    if isinstance(part, protocol.ImagePart)
    else _unmarked(part.text, param)
    for i, part in enumerate(parts)
  )


def _unmarked(text: str, param: str) -> str:
  if IMAGE in text:
    raise ApiError(
      "invalid_value",
      f"a text has {IMAGE!r}, which would stand for a picture; leave it out: the place of a "
      "picture is that of its part",
      param,
    )
  return text
