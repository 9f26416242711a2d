"""One sample's failure stays that sample's failure, whatever library raised it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

REASON = 200  # characters of a reason
_GAP = " ... "

T = TypeVar("T")


class SampleError(ValueError):
  """One sample that cannot be used; the message says what was found and what was expected.

  The message is one line of at most REASON characters that any terminal can print.
  """

  def __init__(self, message: object):
    super().__init__(shortened(str(message)))


def shortened(text: str, longest: int = REASON) -> str:
  """`text` as one printable line; of what is too long the beginning and the end are kept."""
  if len(text) > 4 * longest:  # what falls out is in the gap below
    text = text[: 2 * longest] + text[-2 * longest :]
  line = "".join(c if c.isprintable() else " " if c.isspace() else _escaped(c) for c in text)
  if len(line) <= longest:
    return line
  head = (longest - len(_GAP)) * 2 // 3
  return line[:head] + _GAP + line[head + len(_GAP) - longest :]


def _escaped(character: str) -> str:
  return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def reason(error: BaseException) -> str:
  """Why a sample failed: our own message, or the kind of another library's error and its text."""
  if isinstance(error, SampleError):
    return str(error)
  name, text = type(error).__name__, str(error)
  return shortened(f"{name}: {text}" if text else name)


@contextlib.contextmanager
def of_one_sample() -> Iterator[None]:
  """Turns whatever is raised within into a SampleError; ctrl-C and the like pass.

  Raises: SampleError.
  """
  try:
    yield
  except SampleError:
    raise
  except Exception as error:
    raise SampleError(reason(error)) from error


def attempt(make: Callable[[], T]) -> T | SampleError:
  """What `make` returns, or why there is none: an error that stands in the sample's place."""
  try:
    with of_one_sample():
      return make()
  except SampleError as error:
    return error
