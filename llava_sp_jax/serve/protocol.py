"""Defines the bodies of OpenAI's protocol: what clients send, and what they get.

A field of a request that is null means the same as a missing one. Fields that are not listed here
stand in `fields`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

# Bounds of values; lengths of lists are limits of the server.
Tokens = Annotated[int, Meta(ge=1, le=1 << 30, description="number of tokens")]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Reason = Literal["stop", "length"]


class TextPart(Struct, tag="text", tag_field="type", gc=False):
  """Holds a piece of text in a message."""

  text: str


class ImageUrl(Struct, gc=False):
  """Holds a picture: a `data:` URL, base64, or an http(s) URL from hosts that are allowed.

  `detail` is without effect: the model reads every picture at its own size.
  """

  url: str
  detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(Struct, tag="image_url", tag_field="type", gc=False):
  """Holds a picture between the pieces of text of a message."""

  image_url: ImageUrl


Texts = str | Annotated[list[TextPart], Meta(min_length=1)]


class SystemMessage(Struct, tag="system", tag_field="role", gc=False):
  """Replaces the system text of the model's template."""

  content: Texts


class DeveloperMessage(Struct, tag="developer", tag_field="role", gc=False):
  """Is a system message under its newer name."""

  content: Texts


class UserMessage(Struct, tag="user", tag_field="role", gc=False):
  """Asks, with text and pictures."""

  content: str | Annotated[list[TextPart | ImagePart], Meta(min_length=1)]


class AssistantMessage(Struct, tag="assistant", tag_field="role", gc=False):
  """Repeats an earlier answer. Tools are not called, so `tool_calls` has none."""

  content: Texts
  tool_calls: Annotated[list[Any], Meta(max_length=0)] | None = None


Message = SystemMessage | DeveloperMessage | UserMessage | AssistantMessage


class StreamOptions(Struct, gc=False):
  """Says what a stream has beside the text."""

  include_usage: bool | None = None


class Settings(Struct, kw_only=True):
  """Holds what requests for an answer have in common; None is the server's default."""

  model: str | None = None
  max_tokens: Tokens | None = None
  min_tokens: Annotated[int, Meta(ge=0, le=1 << 30)] | None = None
  temperature: Annotated[float, Meta(ge=0, le=2, description="0 is greedy")] | None = None
  top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
  top_k: Annotated[int, Meta(ge=-1, le=1 << 30, description="-1 and 0 are all")] | None = None
  min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
  seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
  n: Annotated[int, Meta(ge=1, le=1 << 16, description="answers")] | None = None
  stop: str | list[str] | None = None
  stop_token_ids: list[TokenId] | None = None
  ignore_eos: bool | None = None
  presence_penalty: Penalty | None = None
  frequency_penalty: Penalty | None = None
  repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
  logit_bias: dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]] | None = None
  stream: bool | None = None
  stream_options: StreamOptions | None = None

  @property
  def most_tokens(self) -> int | None:
    """Returns the largest number of tokens of an answer, None if it is not said."""
    return self.max_tokens

  @property
  def stops(self) -> tuple[str, ...]:
    """Returns the strings before which an answer ends."""
    return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

  @property
  def includes_usage(self) -> bool:
    """Returns whether a stream ends with the numbers of tokens."""
    return bool(self.stream_options and self.stream_options.include_usage)

  @property
  def log_probabilities(self) -> int | None:
    """Returns how many of the likeliest tokens are wanted at each place, None for nothing at all."""
    return None


class ChatRequest(Settings, kw_only=True):
  """Asks for the next answer of a conversation."""

  messages: Annotated[list[Message], Meta(min_length=1)]
  max_completion_tokens: Tokens | None = None
  logprobs: bool | None = None
  top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None

  @property
  def most_tokens(self) -> int | None:
    """Returns the largest number of tokens of an answer, None if neither field says it."""
    return self.max_completion_tokens or self.max_tokens

  @property
  def log_probabilities(self) -> int | None:
    """Returns how many of the likeliest tokens are wanted at each place, None for nothing at all."""
    return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Settings, kw_only=True):
  """Asks for an answer to one question without pictures."""

  prompt: str


class TokenizeRequest(Struct, kw_only=True):
  """Asks for the tokens of a question, or of a conversation with its pictures; of one of them."""

  model: str | None = None
  prompt: str | None = None
  messages: Annotated[list[Message], Meta(min_length=1)] | None = None


class Usage(Struct, gc=False):
  """Counts tokens; those of a prompt include the image tokens."""

  prompt_tokens: int
  completion_tokens: int
  total_tokens: int


class TopToken(Struct, gc=False):
  """Holds the log probability of a token that might have been chosen."""

  token: str
  logprob: float
  bytes: list[int]


class ChosenToken(Struct):
  """Holds the log probability of a chosen token, and of the most likely ones at its place."""

  token: str
  logprob: float
  bytes: list[int]
  top_logprobs: list[TopToken]


class LogProbabilities(Struct):
  """Holds the log probabilities of an answer, token by token."""

  content: list[ChosenToken]
  refusal: None = None


class AnswerMessage(Struct, gc=False):
  """Holds the text of an answer."""

  content: str
  role: Literal["assistant"] = "assistant"
  refusal: None = None


class Choice(Struct):
  """Holds one answer, and why it ended."""

  index: int
  message: AnswerMessage
  finish_reason: Reason
  logprobs: LogProbabilities | None = None


class ChatCompletion(Struct, kw_only=True):
  """Answers a ChatRequest."""

  id: str
  object: Literal["chat.completion"] = "chat.completion"
  created: int
  model: str
  choices: list[Choice]
  usage: Usage


class Delta(Struct, omit_defaults=True, gc=False):
  """Holds what a chunk adds to the message: its role at first, then text."""

  role: Literal["assistant"] | None = None
  content: str | None = None


class ChunkChoice(Struct):
  """Holds what a chunk adds to one answer; only the last chunk of an answer has a reason."""

  index: int
  delta: Delta
  logprobs: LogProbabilities | None = None
  finish_reason: Reason | None = None


class ChatChunk(Struct, kw_only=True):
  """Holds a part of a streamed answer; the one with `usage` has no choices."""

  id: str
  object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
  created: int
  model: str
  choices: list[ChunkChoice]
  usage: Usage | msgspec.UnsetType = msgspec.UNSET


class TextChoice(Struct):
  """Holds an answer as text alone, or in a stream a part of it; None: it goes on."""

  index: int
  text: str
  finish_reason: Reason | None = None
  logprobs: None = None


class TextCompletion(Struct, kw_only=True):
  """Answers a CompletionRequest, whole or in parts; of parts, the last alone has `usage`."""

  id: str
  object: Literal["text_completion"] = "text_completion"
  created: int
  model: str
  choices: list[TextChoice]
  usage: Usage | msgspec.UnsetType = msgspec.UNSET


class Model(Struct, kw_only=True):
  """Describes a model that is served; `max_model_len` bounds prompt and answer together."""

  id: str
  object: Literal["model"] = "model"
  created: int
  owned_by: str
  max_model_len: int


class Models(Struct, kw_only=True):
  """Lists the models that are served."""

  object: Literal["list"] = "list"
  data: list[Model]


class Tokenized(Struct):
  """Answers a TokenizeRequest; an image token has no id, so `tokens` has -1 in its place."""

  count: int
  max_model_len: int
  tokens: list[int]


class Version(Struct):
  """Names the version of this package."""

  version: str


class ErrorObject(Struct):
  """Says why a request is refused."""

  message: str
  type: str
  param: str | None
  code: str


class ErrorBody(Struct):
  """Holds an error, as clients look for it."""

  error: ErrorObject
