"""Standard output whose reader may go away while a command works on."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class Patient:
  """Passes text on to a stream; when nobody reads it any more, what follows is thrown away."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> int:
    """Returns the number of characters, whether they were read or not."""
    try:
      return self._stream.write(text)
    except BrokenPipeError:
      self._silence()
      return len(text)

  def flush(self) -> None:
    """Passes on what was held back."""
    try:
      self._stream.flush()
    except BrokenPipeError:
      self._silence()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def _silence(self) -> None:
    silence(self._stream)


def silence(stream: TextIO) -> None:
  """Lets all that is written to a stream vanish, also what it holds back."""
  place = os.open(os.devnull, os.O_WRONLY)
  os.dup2(place, stream.fileno())
  os.close(place)


@contextlib.contextmanager
def patient() -> Iterator[None]:
  """Work in the block is not ended by a closed pipe: `llava-sp train ... | head` trains on."""
  out, err = Patient(sys.stdout), Patient(sys.stderr)
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    yield
    out.flush()
