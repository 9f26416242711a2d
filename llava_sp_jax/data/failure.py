"""One sample's failure stays that sample's failure, whatever library raised it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from llava_sp_jax.console import shortened
from llava_sp_jax.errors import LlavaSPError

REASON = 200  # characters of a reason

T = TypeVar("T")


class SampleError(LlavaSPError, ValueError):
  """One sample that cannot be used; the message says what was found and what was expected.

  The message is one line of at most REASON characters that any terminal can print.
  """

  def __init__(self, message: object):
    super().__init__(shortened(str(message), REASON))


def reason(error: BaseException) -> str:
  """Why a sample failed: our own message, or the kind of another library's error and its text."""
  if isinstance(error, SampleError):
    return str(error)
  name, text = type(error).__name__, str(error)
  return shortened(f"{name}: {text}" if text else name, REASON)


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
