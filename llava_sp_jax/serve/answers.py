"""Writes answers: whole ones, the chunks of streams, and errors, as they go over the network."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Sequence

import msgspec

from llava_sp_jax.serve import protocol
from llava_sp_jax.serve.errors import ApiError

DONE = b"data: [DONE]\n\n"  # the last event of a stream, also after an error
STREAM = "text/event-stream; charset=utf-8"
JSON = "application/json"
TOO_SLOW = "the answer took too long; ask for fewer tokens"
_encode = msgspec.json.Encoder().encode


@dataclasses.dataclass(frozen=True)
class Written:
  """Holds an answer as the engine wrote it: its text, why it ended, and its number of tokens.

  `tokens` counts every chosen token, with one that ends the answer.
  """

  text: str
  reason: protocol.Reason
  tokens: int
  log_probabilities: protocol.LogProbabilities | None = None


def error(refusal: ApiError) -> bytes:
  """Returns the body of an error, JSON."""
  about = protocol.ErrorObject(str(refusal), refusal.type, refusal.param, refusal.code)
  return _encode(protocol.ErrorBody(about))


def event(value: msgspec.Struct) -> bytes:
  """Returns a server-sent event with `value` as JSON, which has no line breaks."""
  return b"data: " + _encode(value) + b"\n\n"


def error_event(refusal: ApiError) -> bytes:
  """Returns the event of an error in a stream whose status was already sent."""
  return b"data: " + error(refusal) + b"\n\n"


def usage(prompt_tokens: int, tokens: Sequence[int]) -> protocol.Usage:
  """Returns the count of a prompt's tokens and of all its answers' `tokens`."""
  return protocol.Usage(prompt_tokens, sum(tokens), prompt_tokens + sum(tokens))


def _identity(prefix: str) -> str:
  return dataclasses.field(default_factory=lambda: f"{prefix}-{secrets.token_hex(16)}")


def _now() -> int:
  return dataclasses.field(default_factory=lambda: int(time.time()))


@dataclasses.dataclass(frozen=True)
class ChatAnswer:
  """Writes what one chat request gets, whole or in chunks.

  All parts have the same id, time of creation (seconds since 1970) and model.
  """

  model: str
  id: str = _identity("chatcmpl")
  created: int = _now()

  def whole(self, answers: Sequence[Written], prompt_tokens: int) -> bytes:
    """Returns the body of all answers, JSON."""
    choices = [
      protocol.Choice(i, protocol.AnswerMessage(a.text), a.reason, a.log_probabilities)
      for i, a in enumerate(answers)
    ]
    return _encode(
      protocol.ChatCompletion(
        id=self.id,
        created=self.created,
        model=self.model,
        choices=choices,
        usage=usage(prompt_tokens, [a.tokens for a in answers]),
      )
    )

  def first(self, index: int) -> bytes:
    """Returns the event that begins answer `index`: the role, and no text."""
    return self._chunk(protocol.ChunkChoice(index, protocol.Delta("assistant", "")))

  def more(
    self, index: int, text: str, log_probabilities: protocol.LogProbabilities | None = None
  ) -> bytes:
    """Returns the event that adds a text to answer `index`; the texts join to the whole one."""
    return self._chunk(protocol.ChunkChoice(index, protocol.Delta(content=text), log_probabilities))

  def last(self, index: int, reason: protocol.Reason) -> bytes:
    """Returns the event that ends answer `index`, with why it ended and no text."""
    return self._chunk(protocol.ChunkChoice(index, protocol.Delta(), finish_reason=reason))

  def counted(self, prompt_tokens: int, tokens: Sequence[int]) -> bytes:
    """Returns the event with the counts of tokens, which comes after all answers if asked for."""
    return self._chunk(usage=usage(prompt_tokens, tokens))

  def _chunk(
    self,
    *choices: protocol.ChunkChoice,
    usage: protocol.Usage | msgspec.UnsetType = msgspec.UNSET,
  ) -> bytes:
    return event(
      protocol.ChatChunk(
        id=self.id, created=self.created, model=self.model, choices=list(choices), usage=usage
      )
    )


@dataclasses.dataclass(frozen=True)
class TextAnswer:
  """Writes what a request for a completion gets, as ChatAnswer does for chats."""

  model: str
  id: str = _identity("cmpl")
  created: int = _now()

  def whole(self, answers: Sequence[Written], prompt_tokens: int) -> bytes:
    """Returns the body of all answers, JSON."""
    choices = [protocol.TextChoice(i, a.text, a.reason) for i, a in enumerate(answers)]
    return _encode(self._body(choices, usage(prompt_tokens, [a.tokens for a in answers])))

  def more(self, index: int, text: str) -> bytes:
    """Returns the event that adds a text to answer `index`; the texts join to the whole one."""
    return event(self._body([protocol.TextChoice(index, text)]))

  def last(self, index: int, reason: protocol.Reason) -> bytes:
    """Returns the event that ends answer `index`, with why it ended and no text."""
    return event(self._body([protocol.TextChoice(index, "", reason)]))

  def counted(self, prompt_tokens: int, tokens: Sequence[int]) -> bytes:
    """Returns the event with the counts of tokens, which comes after all answers if asked for."""
    return event(self._body([], usage(prompt_tokens, tokens)))

  def _body(
    self,
    choices: list[protocol.TextChoice],
    usage: protocol.Usage | msgspec.UnsetType = msgspec.UNSET,
  ) -> protocol.TextCompletion:
    return protocol.TextCompletion(
      id=self.id, created=self.created, model=self.model, choices=choices, usage=usage
    )
