"""Reads bodies of requests: JSON to typed requests, or a typed error that names the field.

Bytes, quotation marks and the sizes of fields are checked before objects are made of a body.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import msgspec

from llava_sp_jax.convert import keys
from llava_sp_jax.serve import fields, protocol
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.limits import Limits

# Kind of a request -> the fields that it has beside those of its class.
OTHERS: dict[type[msgspec.Struct], keys.Table] = {
  protocol.ChatRequest: fields.CHAT,
  protocol.CompletionRequest: fields.COMPLETION,
  protocol.TokenizeRequest: fields.TOKENIZE,
}
LONG = ("messages", "prompt")  # fields that only the limit of the whole body bounds

PICTURE = 1 << 16  # characters from which on a string may be a picture that counts as none of text
SHOWN = 300  # characters of either end of a message by msgspec, which quotes the client

# (regex over fields, what to do); the first match ends a message.
HINTS = (
  (r"messages\[\d+\]\.role", "known roles: system, developer, user, assistant"),
  (r"messages\[\d+\]\.content\[\d+\]\.type", "known parts: text, and image_url of a user"),
  (r"messages\[\d+\]\.content\[\d+\]\.image_url\.detail", "known: auto, low, high, original"),
  (r"messages\[\d+\]\.content\[\d+\]\.image_url", "send {'url': 'data:image/png;base64,...'}"),
  (r"messages\[\d+\]\.tool_calls", "the model calls no tools; leave it out"),
  (r"messages\[\d+\]\.content", "send a text, or a list of parts"),
)
_WHERE = re.compile(r" - at (?:`key` in )?`\$\.?([^`\s]*)`$")
_MISSING = re.compile(r"Object missing required field `(.*)`")
R = TypeVar("R", bound=msgspec.Struct)
T = TypeVar("T")
Problem = tuple[bool, str, str, str]  # holds, code, field, message


def read(body: bytes, form: type[R], limits: Limits) -> R:
  """Returns the request of a body; `form` is a key of OTHERS.

  Raises: ApiError for a body that is no JSON or too large, a field with a wrong or unsupported
    value, fields that contradict each other, and values above a limit.
  """
  for count, most, what in (
    (len(body), limits.body_bytes, "bytes"),
    (body.count(b'"'), limits.quotes, "quotation marks"),
  ):
    if count > most:
      raise ApiError("request_too_large", f"the body has {count:,} {what}; at most {most:,}")
  if len(body) > limits.text_bytes and (size := _text_bytes(body)) > limits.text_bytes:
    raise ApiError(
      "request_too_large",
      f"the body has {size:,} bytes of text; at most {limits.text_bytes:,} beside pictures",
    )
  outline, refused = _decoded(body, _outline(form)), fields.refused(OTHERS[form])
  for name in outline.__struct_fields__:
    raw = getattr(outline, name)
    if raw is msgspec.UNSET or name in LONG:
      continue
    if (size := len(memoryview(raw))) > limits.field_bytes:
      raise ApiError("too_many", f"{name}: {size:,} bytes; at most {limits.field_bytes:,}", name)
    if name in refused and (found := keys.problem(name, _decoded(raw, object), refused[name])):
      raise _unsupported(name, refused[name], found)
  request = _decoded(body, form)
  for holds, code, param, message in _checks(request, limits):
    if not holds:
      raise ApiError(code, message, param)
  return request


def check_model(name: str | None, served: Sequence[str]) -> str:
  """Returns the name of a model that is served; the first one if the request names none.

  Raises: ApiError (404) for any other name.
  """
  if name is None:
    return served[0]
  if name not in served:
    known = ", ".join(served)
    raise ApiError("model_not_found", f"no model {name!r}; served here: {known}", "model")
  return name


def _text_bytes(body: bytes) -> int:
  """Counts the bytes outside of long strings that are ASCII without escapes, as pictures are.

  Of other strings, Python needs up to four bytes a character, and several copies.
  """
  found, start = len(body), 0
  while (end := body.find(b'"', start)) >= 0:
    if end - start >= PICTURE and start and body[start - 2 : start - 1] != b"\\":
      inside = body[start:end]
      found -= len(inside) if inside.isascii() and b"\\" not in inside else 0
    start = end + 1
  return found


@functools.cache
def _outline(form: type[msgspec.Struct]) -> type[msgspec.Struct]:
  """Makes a class with the same fields and the refused ones, whose values stay JSON."""
  names = dict.fromkeys((*form.__struct_fields__, *fields.refused(OTHERS[form])))
  kind = msgspec.Raw | msgspec.UnsetType
  return msgspec.defstruct(
    f"{form.__name__}Outline", [(name, kind, msgspec.UNSET) for name in names]
  )


def _unsupported(name: str, key: keys.Key, found: str) -> ApiError:
  if key.values == keys.NOTHING:
    message = f"{name} is not supported: {key.why}; leave it out"
    return ApiError("unsupported_parameter", message, name)
  return ApiError("unsupported_value", f"{found}; leave it out", name)


def _decoded(body: bytes | msgspec.Raw, kind: type[T]) -> T:
  try:
    return msgspec.json.decode(body, type=kind)
  except msgspec.ValidationError as error:
    raise _typed(str(error)) from None
  except RecursionError:
    raise ApiError("invalid_json", "the body is nested too deeply") from None
  except (msgspec.DecodeError, UnicodeDecodeError) as error:
    raise ApiError("invalid_json", f"the body is not JSON in UTF-8: {error}") from None


def _typed(text: str) -> ApiError:
  """Turns a message of msgspec into an error that names the field."""
  text = text if len(text) <= 2 * SHOWN else f"{text[:SHOWN]} ... {text[-SHOWN:]}"
  # Only the last part is msgspec's: a text of the client may stand before it.
  where = _WHERE.match(text, max(text.rfind(" - at "), 0))
  param, text = (where[1].replace("[...]", ""), text[: where.start()]) if where else ("", text)
  code = "invalid_type" if ", got " in text else "invalid_value"
  if missing := _MISSING.fullmatch(text):
    param = f"{param}.{missing[1]}".lstrip(".")
    code, text = "missing_required_parameter", f"{param} is missing"
  hints = [hint for pattern, hint in HINTS if re.match(pattern, param)]
  said = f"{param}: {text}" if param and not missing else text
  return ApiError(code, "; ".join([said.replace("`", "'"), *hints[:1]]), param or None)


def _checks(request: msgspec.Struct, limits: Limits) -> Iterator[Problem]:
  if isinstance(request, protocol.TokenizeRequest):
    one = (request.prompt is None) != (request.messages is None)
    yield one, "invalid_value", "prompt", "expected one of prompt and messages"
  if isinstance(request, protocol.Settings):
    yield from _of_settings(request, limits)
  if isinstance(request, protocol.ChatRequest):
    both = request.max_tokens is None or request.max_completion_tokens in (None, request.max_tokens)
    yield (
      both,
      "invalid_value",
      "max_tokens",
      "max_tokens and max_completion_tokens differ; send one",
    )
    asked = not request.top_logprobs or request.logprobs is True
    yield asked, "invalid_value", "top_logprobs", "top_logprobs needs logprobs: true"
  prompt: str | None = getattr(request, "prompt", None)
  yield _at_most("prompt", len(prompt or ""), limits.characters, "characters of text")
  messages: Sequence[protocol.Message] = getattr(request, "messages", None) or ()
  yield _at_most("messages", len(messages), limits.messages, "messages")
  parts = sum(len(each.content) for each in messages if isinstance(each.content, list))
  yield _at_most("messages", parts, limits.parts, "parts of messages")
  characters = sum(map(_characters, messages))
  yield _at_most("messages", characters, limits.characters, "characters of text")


def _characters(message: protocol.Message) -> int:
  if isinstance(message.content, str):
    return len(message.content)
  return sum(len(part.text) for part in message.content if isinstance(part, protocol.TextPart))


def _of_settings(request: protocol.Settings, limits: Limits) -> Iterator[Problem]:
  stream = request.stream_options is None or request.stream is True
  yield stream, "invalid_value", "stream_options", "stream_options needs stream: true"
  most, least = request.most_tokens, request.min_tokens or 0
  told = "max_tokens" if request.max_tokens is not None else "max_completion_tokens"
  yield _at_most(told, most or 0, limits.new_tokens, "tokens of an answer")
  fits = most is None or least <= most
  yield fits, "invalid_value", "min_tokens", f"min_tokens {least} is more than {told} {most}"
  yield _at_most("min_tokens", least, limits.new_tokens, "tokens of an answer")
  yield _at_most("n", request.n or 1, limits.choices, "answers to a request")
  yield _at_most("stop", len(request.stops), limits.stop_strings, "stop strings")
  longest = max(map(len, request.stops), default=0)
  yield _at_most("stop", longest, limits.stop_characters, "characters of a stop string")
  yield all(request.stops), "invalid_value", "stop", "a stop string is empty; leave it out"
  ids, biases = len(request.stop_token_ids or ()), len(request.logit_bias or ())
  yield _at_most("stop_token_ids", ids, limits.stop_ids, "token ids")
  yield _at_most("logit_bias", biases, limits.biases, "biases")


def _at_most(param: str, found: int, most: int, what: str) -> Problem:
  return (
    found <= most,
    "too_many",
    param,
    f"{param}: {found:,} {what}; at most {most:,} are allowed",
  )
