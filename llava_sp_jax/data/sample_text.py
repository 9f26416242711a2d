"""Parses the text of one sample, and says in one line what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

from llava_sp_jax.data.failure import SampleError

UTF_8 = "utf-8"


class NoTextError(ValueError):
  """Reports bytes that are not valid in the encoding that was detected."""


def sample(name: str, start: int, content: bytes) -> Any:
  """Parses a sample; returns its value, or a SampleError that says why it has none.

  Args:
    name: the file and the part of it, for messages.
    start: the offset of `content` in the file, for messages.
    content: the bytes of the sample.
  """
  try:
    return loads(decoded(content, UTF_8, start))
  except NoTextError as error:
    why = str(error)
  except RecursionError:
    why = f"at byte {start} is not JSON (nested too deeply)"
  except json.JSONDecodeError as error:
    at = start + len(error.doc[: error.pos].encode(UTF_8, "surrogatepass"))
    why = f"is not JSON ({error.msg.removesuffix(' at')} at byte {at})"
  return SampleError(f"{name} {why}")


def decoded(data: bytes, encoding: str, start: int = 0) -> str:
  """Decodes bytes that begin at offset `start` of a file. Raises: NoTextError."""
  try:
    # Half of a surrogate pair must fail only its sample (in `forms`), not the file.
    return data.decode(encoding, "surrogatepass")
  except UnicodeDecodeError as error:
    at = len(data) - len(error.object) + error.start  # `error.object` lacks the byte order mark
    name = encoding.removesuffix("-sig")
    raise NoTextError(
      f"is not {name} text (byte {data[at]:#04x} at {start + at}); save it as UTF-8"
    ) from None


def loads(text: str) -> Any:
  """Parses JSON; keeps an integer with more digits than Python converts as text.

  Raises: JSONDecodeError; RecursionError.
  """
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    raise
  except ValueError:
    return json.loads(text, parse_int=whole)


def whole(digits: str) -> int | str:
  """Returns the integer of a text, or the text if it has more digits than Python converts."""
  try:
    return int(digits)
  except ValueError:
    return digits
