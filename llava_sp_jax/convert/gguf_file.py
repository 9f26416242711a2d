"""Reads the container of GGUF: metadata, and the place of each tensor in the file.

Counts and lengths are checked against the size of the file.
Source: docs/gguf.md of ggml (versions 2 and 3, either order of bytes).
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax import files
from llava_sp_jax.convert.tensor import (
  MAX_TENSORS,
  DataFile,
  MalformedError,
  check_name,
  check_shape,
)
from llava_sp_jax.files import FormatError

MAX_KEYS = 4096
MAX_HEADER = 64 << 20  # bytes of metadata
MAX_TEXT = 1 << 20  # bytes
MAX_TEXTS = 1 << 20  # tokens and merges together
MAX_AXES = 4

# type -> format of struct, which is numpy's, too; texts and arrays have methods
_NUMBERS = {
  0: "B",
  1: "b",
  2: "H",
  3: "h",
  4: "I",
  5: "i",
  6: "f",
  7: "?",
  10: "Q",
  11: "q",
  12: "d",
}
_BOOL, _TEXT, _ARRAY = 7, 8, 9


@dataclasses.dataclass(frozen=True)
class Place:
  """Holds the place of a tensor; the last axis of `shape` is the fastest, as in numpy."""

  name: str
  shape: tuple[int, ...]
  kind: int  # ggml's type of the stored values
  start: int
  size: int  # bytes


@dataclasses.dataclass(frozen=True)
class Container:
  """Holds the content of a GGUF file.

  Texts in `values` are bytes; arrays are lists of bytes or numpy arrays.
  """

  file: DataFile
  big_endian: bool
  values: Mapping[str, Any]
  tensors: tuple[Place, ...]


def open_container(path: Path, blocks: Mapping[int, tuple[int, int]]) -> Container:
  """Reads everything before the values of the tensors.

  `blocks` maps each kind of tensor to (values of a block, bytes of a block).

  Raises: FormatError when the file is damaged, or no GGUF of version 2 or 3.
  """
  file = DataFile.open(path)
  try:
    if file.size < 24:
      raise MalformedError("the file ends too early")
    with (
      files.open_regular(path) as opened,
      mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
      return _Reader(file, data).container(blocks)
  except MalformedError as error:
    raise FormatError(f"{path}: cannot be read as GGUF: {error}") from None


class _Reader:
  """Reads the head of a file, and checks every read against the bytes that are left."""

  def __init__(self, file: DataFile, data: mmap.mmap):
    self.file, self.data, self.at = file, data, 0
    self.end = min(file.size, MAX_HEADER)
    self.texts = 0
    if self.take(4) != b"GGUF":
      raise MalformedError("it does not begin with GGUF")
    self.order = ">" if self.take(2) == b"\0\0" else "<"  # from the version, a small number
    self.at = 4

  def container(self, blocks: Mapping[int, tuple[int, int]]) -> Container:
    version = self.number("I")
    if version not in (2, 3):
      raise MalformedError(f"version {version:,}; known: 2 and 3")
    tensors, keys = self.number("Q"), self.number("Q")
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
      raise MalformedError(
        f"{tensors:,} tensors and {keys:,} keys, expected at most {MAX_TENSORS:,} and {MAX_KEYS:,}"
      )
    values: dict[str, Any] = {}
    for _ in range(keys):
      name = self.name()
      if name in values:
        raise MalformedError(f"the key {name} is given twice")
      values[name] = self.value(self.number("I"))
    places = [self.place(blocks) for _ in range(tensors)]
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment not in (2**n for n in range(21)):
      raise MalformedError("general.alignment is no power of two up to 2^20")
    start = -(-self.at // alignment) * alignment
    found = tuple(dataclasses.replace(place, start=place.start + start) for place in places)
    self.check(found, start, alignment)
    return Container(self.file, self.order == ">", values, found)

  def check(self, places: tuple[Place, ...], start: int, alignment: int) -> None:
    """Raises MalformedError unless all tensors have a name and a place of their own."""
    if len({place.name for place in places}) < len(places):
      raise MalformedError("two tensors have one name")
    end = start
    for place in sorted(places, key=lambda place: (place.start, place.size)):
      if place.start < end or (place.start - start) % alignment:
        raise MalformedError(f"{place.name} overlaps another tensor or is not aligned")
      end = place.start + place.size
      if end > self.file.size:
        raise MalformedError(
          f"{place.name} needs {end:,} bytes, but the file has {self.file.size:,}"
        )

  # ---- parts of the head -------------------------------------------------------------------------

  def take(self, count: int) -> bytes:
    if count > self.end - self.at:
      raise MalformedError("its metadata are longer than the file, or than any model's")
    self.at += count
    return self.data[self.at - count : self.at]

  def number(self, form: str) -> Any:
    return struct.unpack(self.order + form, self.take(struct.calcsize(self.order + form)))[0]

  def text(self) -> bytes:
    length = self.number("Q")
    if length > MAX_TEXT:
      raise MalformedError(f"a text of {length:,} bytes, expected at most {MAX_TEXT:,}")
    return self.take(length)

  def name(self) -> str:
    try:
      return check_name(self.text().decode())
    except UnicodeDecodeError:
      raise MalformedError("a name that is not UTF-8") from None

  def value(self, kind: int) -> Any:
    if kind == _TEXT:
      return self.text()
    if kind == _ARRAY:
      return self.array(self.number("I"), self.number("Q"))
    if kind not in _NUMBERS:
      raise MalformedError(f"a value of the unknown type {kind:,}")
    return self.number(_NUMBERS[kind])

  def array(self, kind: int, count: int) -> list[bytes] | np.ndarray:
    if kind == _TEXT:
      self.texts += count
      if self.texts > MAX_TEXTS:
        raise MalformedError(f"{self.texts:,} texts, expected at most {MAX_TEXTS:,}")
      return [self.text() for _ in range(count)]
    if kind not in _NUMBERS:
      raise MalformedError(f"an array of the type {kind:,}, expected texts or numbers")
    stored = np.dtype(np.uint8 if kind == _BOOL else self.order + _NUMBERS[kind])
    return np.frombuffer(self.take(count * stored.itemsize), stored)

  def place(self, blocks: Mapping[int, tuple[int, int]]) -> Place:
    """Reads the place of a tensor; its start is still relative to the first value."""
    name, axes = self.name(), self.number("I")
    if not 1 <= axes <= MAX_AXES:
      raise MalformedError(f"{name} has {axes:,} axes, expected 1 to {MAX_AXES}")
    shape = check_shape([self.number("Q") for _ in range(axes)][::-1], 8)
    kind, start = self.number("I"), self.number("Q")
    if kind not in blocks:
      raise MalformedError(f"{name} is stored as the unknown type {kind:,}")
    values, size = blocks[kind]
    if shape[-1] % values:
      raise MalformedError(
        f"{name} has rows of {shape[-1]:,}, which are no whole blocks of {values}"
      )
    return Place(name, shape, kind, start, math.prod(shape) // values * size)
