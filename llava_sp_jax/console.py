"""What reaches a terminal: text that drives none, through streams that may be closed, full or ASCII."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from llava_sp_jax.errors import LlavaSPError

# What a terminal obeys instead of showing it (control characters, C0 and C1, but for tab and newline),
# what turns the direction of text around or ends a line unseen, and halves of surrogate pairs. The
# joiners of scripts and emoji (U+200C, U+200D) belong to the text.
_OBEYED = re.compile(
  "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)

_GAP = " ... "


def safe(text: str) -> str:
  """`text` with all that a terminal would obey written as escapes; tabs and newlines stay."""
  return _OBEYED.sub(lambda found: _escape(found[0]), text)


def one_line(text: object) -> str:
  """A text, such as a name out of a file, on one line that a terminal shows and does not obey.

  Lines are joined by semicolons, or by nothing but a blank behind a colon.
  """
  lines = [part for line in str(text).split("\n") if (part := line.strip())]
  return safe("; ".join(lines).replace(":; ", ": ").replace("\t", " "))


def shortened(text: str, longest: int) -> str:
  """A text of any length as one line of at most `longest` characters that every terminal can print.

  Stricter than `safe`: what has no glyph of its own is escaped. Of what is too long the beginning and
  the end are kept.
  """
  if len(text) > 4 * longest:  # what falls out is in the gap below
    text = text[: 2 * longest] + text[-2 * longest :]
  line = "".join(c if c.isprintable() else " " if c.isspace() else _escape(c) for c in text)
  if len(line) <= longest:
    return line
  head = (longest - len(_GAP)) * 2 // 3
  return line[:head] + _GAP + line[head + len(_GAP) - longest :]


def error_line(error: BaseException) -> str:
  """The line of an error; empty for one that is a mistake of ours and keeps its traceback.

  Names out of files stand in it: what a terminal would obey is escaped.
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
  """Prints a text of several lines at once; what came out of files in it drives no terminal.

  Raises: BrokenPipeError, StreamError.
  """
  with _taking():
    print(safe(str(text)), file=sys.stderr if error else sys.stdout, end=end, flush=True)


def _escape(character: str) -> str:
  return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def open_streams() -> None:
  """Makes standard output and standard error writable, whatever the shell made of them.

  A closed one takes what is written and drops it. What a stream's encoding cannot hold is escaped.
  """
  for name in ("stdout", "stderr"):
    stream: Any = getattr(sys, name)
    if stream is None:
      setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    elif getattr(stream, "errors", "") == "strict" and hasattr(stream, "reconfigure"):
      stream.reconfigure(errors="backslashreplace")


class StreamError(LlavaSPError, RuntimeError):
  """Standard output takes no more."""


def flush() -> None:
  """Hands on what standard output holds back. Raises: BrokenPipeError, StreamError."""
  with _taking():
    sys.stdout.flush()


@contextlib.contextmanager
def _taking() -> Iterator[None]:
  """Raises: BrokenPipeError, and StreamError in place of what else a stream fails with."""
  try:
    yield
  except BrokenPipeError:
    raise
  except OSError as error:
    raise StreamError(f"standard output: {error.strerror or error}") from None


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
