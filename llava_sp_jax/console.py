"""Prints text to terminals safely, through streams that may be closed, full or ASCII only.

Control characters in a text, for instance in a file name, are escaped.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from llava_sp_jax.errors import LlavaSPError

# Characters that control a terminal (C0 and C1, except tab and newline), change the direction of
# text, are invisible or end a line, and halves of surrogate pairs. The joiners of scripts and emoji
# (U+200C, U+200D) belong to the text.
_OBEYED = re.compile(
  "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)

_GAP = " ... "


def safe(text: str) -> str:
  """Returns `text` with all characters that control a terminal escaped; tabs and newlines stay."""
  return _OBEYED.sub(lambda found: _escape(found[0]), text)


def one_line(text: object) -> str:
  """Returns a text, such as a name from a file, on one line without control characters.

  Lines are joined by semicolons, or by a blank after a colon.
  """
  lines = [part for line in str(text).split("\n") if (part := line.strip())]
  return safe("; ".join(lines).replace(":; ", ": ").replace("\t", " "))


def shortened(text: str, longest: int) -> str:
  """Returns a text of any length as one line of at most `longest` printable characters.

  It is stricter than `safe`: everything that is not printable is escaped. From a longer text, the
  beginning and the end are kept.
  """
  if len(text) > 4 * longest:  # the part that is dropped here falls into the gap below
    text = text[: 2 * longest] + text[-2 * longest :]
  line = "".join(c if c.isprintable() else " " if c.isspace() else _escape(c) for c in text)
  if len(line) <= longest:
    return line
  head = (longest - len(_GAP)) * 2 // 3
  return line[:head] + _GAP + line[head + len(_GAP) - longest :]


def error_line(error: BaseException) -> str:
  """Returns the line that reports an error to a user; "" for a bug of this package.

  Control characters in it are escaped, because names from files stand in it.
  """
  return one_line(_error_text(error))


def _error_text(error: BaseException) -> str:
  text = str(error)
  if isinstance(error, LlavaSPError):
    return text
  if isinstance(error, OSError):  # files, disks, devices
    return text if error.filename is None else f"{error.filename}: {error.strerror or text}"
  if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("llava_sp_jax"):
    return f"{text}; install it, or the extra of llava-sp-jax that brings it (README lists them)"
  if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
    return f"out of memory ({(text.splitlines() or ['on the host'])[0][:200]})"
  return ""


def say(text: object, *, error: bool = False, end: str = "\n") -> None:
  """Prints a text of several lines at once, with control characters escaped, and then `end`.

  It goes to standard output, or with `error` to standard error.

  Raises: BrokenPipeError when the reader has closed the pipe; StreamError when it cannot be
    written.
  """
  with _taking():
    print(safe(str(text)), file=sys.stderr if error else sys.stdout, end=end, flush=True)


def _escape(character: str) -> str:
  return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def open_streams() -> None:
  """Makes standard output and standard error writable.

  Output to a closed stream is discarded. Characters that the encoding of a stream lacks are
  escaped.
  """
  for name in ("stdout", "stderr"):
    stream: Any = getattr(sys, name)
    if stream is None:
      setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    elif getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="backslashreplace")


class StreamError(LlavaSPError, RuntimeError):
  """Raised when standard output cannot be written."""


def flush() -> None:
  """Flushes standard output.

  Raises: BrokenPipeError when the reader has closed the pipe; StreamError when it cannot be
    written.
  """
  with _taking():
    sys.stdout.flush()


@contextlib.contextmanager
def _taking() -> Iterator[None]:
  """Turns any OSError of the block, except BrokenPipeError, into a StreamError."""
  try:
    yield
  except BrokenPipeError:
    raise
  except OSError as error:
    raise StreamError(f"standard output: {error.strerror or error}") from None


class Patient:
  """Passes text on to a stream, and discards it once the reader has closed the pipe."""

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> int:
    """Writes `text` and returns its length, also if it was discarded."""
    try:
      return self._stream.write(text)
    except BrokenPipeError:
      self._silence()
      return len(text)

  def flush(self) -> None:
    """Flushes the stream."""
    try:
      self._stream.flush()
    except BrokenPipeError:
      self._silence()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)

  def _silence(self) -> None:
    silence(self._stream)


def silence(stream: TextIO) -> None:
  """Redirects a stream to the null device, also the text in its buffer."""
  place = os.open(os.devnull, os.O_WRONLY)
  os.dup2(place, stream.fileno())
  os.close(place)


@contextlib.contextmanager
def patient() -> Iterator[None]:
  """Keeps the block running after its pipe is closed, as in `llava-sp train ... | head`."""
  out, err = Patient(sys.stdout), Patient(sys.stderr)
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    yield
    out.flush()
