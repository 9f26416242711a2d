"""Finds the samples of a sound file in one pass, and holds where they are in place of what they are.

A file is sound if it is UTF-8, and a list of items that are all JSON, or lines of which the first is.
"""

from __future__ import annotations

import array
import codecs
import io
import json
import os
import re
import threading
import typing
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llava_sp_jax import files
from llava_sp_jax.data import sample_text
from llava_sp_jax.data.content import Fingerprint
from llava_sp_jax.data.failure import SampleError, SourceError
from llava_sp_jax.data.sample_text import UTF_8

BLOCK = 1 << 22  # bytes that are read at a time
BLANKS = b" \t\r\n"
ITEM, LINE = "item", "line"  # what a part of a file is called in messages
_BLANK = re.compile(r"[ \t\r\n]*")
_PLAIN = json.JSONDecoder()
_LONG = json.JSONDecoder(parse_int=sample_text.whole)  # slower; also reads integers of any length


class Offsets(Sequence[Any]):
  """Reads samples from a file by their offsets; may be used by several threads.

  It can be sent to another process, which opens the file again.
  """

  def __init__(
    self, path: Path, kind: str, starts: np.ndarray, ends: np.ndarray, numbers: np.ndarray
  ):
    """Stores where the samples are.

    Args:
      path: the file.
      kind: ITEM or LINE.
      starts: [N] int64, the offset of each sample in bytes.
      ends: [N] int64, the offset behind it.
      numbers: [N] int32, the number of each item or line, from 1.
    """
    self.kind, self.starts, self.ends, self.numbers = kind, starts, ends, numbers
    self._path, self._stamp = path, _stamp(path.stat())
    self._file: BinaryIO | None = None
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_file": None, "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock())

  def __len__(self) -> int:
    return len(self.starts)

  def __getitem__(self, index: Any) -> Any:
    """Returns the sample of an index, or a SampleError if it is not JSON.

    Raises: SourceError when the file has changed since its samples were found.
    """
    start, end = int(self.starts[index]), int(self.ends[index])
    content = files.read_at(self._opened(), self._path, start, end - start)
    return sample_text.sample(
      f"{self._path.name}, {self.kind} {self.numbers[index]}", start, content
    )

  def _opened(self) -> BinaryIO:
    with self._lock:
      if self._file is None:
        self._file = files.open_regular(self._path)
        weakref.finalize(self, self._file.close)
    if _stamp(os.fstat(self._file.fileno())) != self._stamp:
      raise SourceError(f"{self._path} has changed since its samples were found; start again")
    return self._file


def _stamp(about: os.stat_result) -> tuple[int, int]:
  return about.st_size, about.st_mtime_ns


class _NotSoundError(ValueError):
  """Reports a file whose parts are not where a sound one has them; read it as a whole."""


Part = tuple[int, int, int, Any]  # offset, offset behind it, number from 1, sample


def find(path: Path) -> tuple[Offsets, str] | None:
  """Returns the samples of a file and their fingerprint, or None if it is not sound."""
  with files.open_regular(path) as file:
    first = file.read(BLOCK)
    if json.detect_encoding(first).removesuffix("-sig") != UTF_8:
      return None
    begin = len(first) - len(first.removeprefix(codecs.BOM_UTF8))
    kind, scan = _SCANS.get(first[begin:].lstrip(BLANKS)[:1], ("", None))
    if scan is None:
      return None
    starts, ends, numbers = array.array("q"), array.array("q"), array.array("i")
    fingerprint, any_sample = Fingerprint(), False
    file.seek(begin)
    try:
      for start, end, number, sample in scan(file, begin):
        starts.append(start)
        ends.append(end)
        numbers.append(number)
        fingerprint.add(sample)
        any_sample = any_sample or kind == ITEM or isinstance(sample, dict)
    except _NotSoundError:
      return None
  if not any_sample:
    return None
  arrays = (np.array(starts, np.int64), np.array(ends, np.int64), np.array(numbers, np.int32))
  return Offsets(path, kind, *arrays), fingerprint.hexdigest()


class _Text:
  """Holds a window of a file as text, and knows the offset of each of its characters."""

  def __init__(self, file: BinaryIO, at: int):
    self._file, self._bytes, self.text, self.place = file, b"", "", 0
    self._at, self._counted, self._ended = at, 0, False  # offset of character `_counted`

  def more(self) -> bool:
    """Appends to the window and drops what lies before `place`; returns False at the file's end."""
    if self._ended:
      return False
    self.offset(self.place)
    data = self._file.read(max(BLOCK, len(self.text) - self.place))  # a long item: in few steps
    self._ended, self._bytes = not data, self._bytes + data
    # An ASCII character ends the part that is decoded, so that no character is cut in two.
    whole = len(self._bytes)
    while not self._ended and whole and self._bytes[whole - 1] > 127:
      whole -= 1
    decoded = sample_text.decoded(self._bytes[:whole], UTF_8)
    self._bytes = self._bytes[whole:]
    self.text, self.place, self._counted = self.text[self.place :] + decoded, 0, 0
    return True

  def offset(self, place: int) -> int:
    """Returns the offset of a character, which must not lie before the last one that was asked."""
    between = self.text[self._counted : place]
    self._at += len(between if between.isascii() else between.encode(UTF_8, "surrogatepass"))
    self._counted = place
    return self._at

  def sign(self) -> str:
    """Moves to the next character that is not blank, and returns it; "" at the end of the file."""
    while True:
      self.place = _BLANK.match(self.text, self.place).end()  # type: ignore[union-attr]
      if self.place < len(self.text) or not self.more():
        return self.text[self.place : self.place + 1]


def _items(file: BinaryIO, at: int) -> Iterator[Part]:
  """Yields the items of a list; raises _NotSoundError where it is none."""
  window, number, sign = _Text(file, at), 0, ""
  try:
    window.sign()
    window.place += 1  # the bracket
    while sign != "]":
      if window.sign() == "]" and not number:
        raise _NotSoundError  # an empty list
      sample, end, sign = _item(window)
      number += 1
      start = window.offset(window.place)
      yield start, window.offset(end), number, sample
      window.place = window.text.index(sign, end) + 1
    if window.sign():
      raise _NotSoundError  # something follows the list
  except (sample_text.NoTextError, RecursionError):
    raise _NotSoundError from None


def _item(window: _Text) -> tuple[Any, int, str]:
  """Returns the item at the window's place, the place behind it, and the sign that follows it."""
  while True:
    try:
      sample, end = _value(window.text, window.place)
      follows = _BLANK.match(window.text, end)
      after = follows.end() if follows else end
      if (sign := window.text[after : after + 1]) and sign in ",]":
        return sample, end, sign
      if sign:
        raise _NotSoundError
    except json.JSONDecodeError:
      pass
    if not window.more():  # the item is not cut off by the window, but wrong
      raise _NotSoundError


def _value(text: str, place: int) -> tuple[Any, int]:
  try:
    return _PLAIN.raw_decode(text, place)
  except json.JSONDecodeError:
    raise
  except ValueError:
    return _LONG.raw_decode(text, place)


def _lines(file: BinaryIO, at: int) -> Iterator[Part]:
  """Yields the lines that are not blank; raises _NotSoundError unless the first one is JSON."""
  found = 0
  with io.BufferedReader(typing.cast(io.RawIOBase, file), BLOCK) as buffered:
    for number, line in enumerate(buffered, 1):
      content = line.removesuffix(b"\n")
      if content.strip():
        sample = sample_text.sample("", at, content)
        if not found and isinstance(sample, SampleError):
          raise _NotSoundError
        found += 1
        yield at, at + len(content), number, sample
      at += len(line)
  if found < 2:
    raise _NotSoundError  # one value, which may be a sample


# First character that is not blank -> what a part is called, and what finds the parts.
_SCANS: dict[bytes, tuple[str, Callable[[BinaryIO, int], Iterator[Part]]]] = {
  b"[": (ITEM, _items),
  b"{": (LINE, _lines),
}
