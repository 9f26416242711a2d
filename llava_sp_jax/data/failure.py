"""Confines any exception about one sample to that sample, whatever library raised it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from llava_sp_jax.console import shortened
from llava_sp_jax.errors import LlavaSPError

REASON = 200  # the most characters of a reason

T = TypeVar("T")


class SampleError(LlavaSPError, ValueError):
  """Reports a sample that cannot be used: what was found, and what was expected.

  The message is one printable line of at most REASON characters.
  """

  def __init__(self, message: object):
    super().__init__(shortened(str(message), REASON))


class SourceError(LlavaSPError, RuntimeError):
  """Reports that a data set as a whole can no longer be read; never costs just one sample."""


def reason(error: BaseException) -> str:
  """Returns why a sample failed: the text of a SampleError, or type and text of another error.

  The result is one printable line of at most REASON characters.
  """
  if isinstance(error, SampleError):
    return str(error)
  name, text = type(error).__name__, str(error)
  return shortened(f"{name}: {text}" if text else name, REASON)


@contextlib.contextmanager
def of_one_sample() -> Iterator[None]:
  """Turns every Exception of a block into a SampleError.

  SourceError, and KeyboardInterrupt and the like, pass.
  """
  try:
    yield
  except (SampleError, SourceError):
    raise
  except Exception as error:
    raise SampleError(reason(error)) from error


def attempt(make: Callable[[], T]) -> T | SampleError:
  """Calls `make` and returns its result, or the SampleError that says why it failed."""
  try:
    with of_one_sample():
      return make()
  except SampleError as error:
    return error
