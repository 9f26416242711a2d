"""Holds named arrays of foreign files; sizes are checked before any value is read."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llava_sp_jax import files
from llava_sp_jax.errors import LlavaSPError
from llava_sp_jax.files import FormatError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MAX_AXES = 32
MAX_NAME = 1024  # characters
MAX_TENSORS = 1 << 16  # of one file
SHARED = 8  # tensors may share bytes, but all of them have at most SHARED times the file's size
SMALL = 1 << 20  # total bytes of tensors up to which that is not checked
PIECE = 1 << 20  # values compared at once


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Holds a named array in a file; `array()` returns its values, mapped where possible."""

  name: str
  origin: str  # the file, for messages
  shape: tuple[int, ...]
  dtype: np.dtype
  array: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    """Returns the size of the whole array in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize

  def renamed(self, name: str) -> Tensor:
    """Returns the tensor under the name `name`."""
    return dataclasses.replace(self, name=name)


Tensors = dict[str, Tensor]


def alike(one: Tensor, two: Tensor) -> bool:
  """Returns whether two tensors have the same shape and numbers; reads them piece by piece."""
  if one.shape != two.shape:
    return False
  a, b = one.array().reshape(-1), two.array().reshape(-1)
  return all(np.array_equal(a[i : i + PIECE], b[i : i + PIECE]) for i in range(0, len(a), PIECE))


class MalformedError(LlavaSPError, ValueError):
  """Says what is wrong with a file, without its name; raised only inside the readers of files."""


def check_name(name: Any) -> str:
  """Returns a tensor's name.

  Raises: MalformedError for one that an error could not print in one line.
  """
  if not isinstance(name, str) or len(name) > MAX_NAME or not name.isprintable():
    raise MalformedError(f"a tensor's name is no printable text of at most {MAX_NAME:,} characters")
  return name


def check_shape(shape: Iterable[Any], itemsize: int) -> tuple[int, ...]:
  """Returns the sizes of `shape` as a tuple; `itemsize` is that of the array in bytes.

  Raises: MalformedError for a shape that no array can have.
  """
  sizes = tuple(shape)
  if len(sizes) > MAX_AXES or not all(type(n) is int and 0 <= n < 1 << 62 for n in sizes):
    raise MalformedError("a tensor's shape is no list of non-negative integers")
  if math.prod(max(n, 1) for n in sizes) * itemsize >= 1 << 62:
    raise MalformedError("a tensor's shape is larger than any array")
  return sizes


def check_total(tensors: Iterable[Tensor], size: int) -> None:
  """Raises MalformedError when tensors stand for far more than the `size` bytes of their file."""
  total = sum(tensor.nbytes for tensor in tensors)
  if total > max(SHARED * size, SMALL):
    raise MalformedError(f"its tensors stand for {total:,} bytes, but the file has {size:,}")


@dataclasses.dataclass(frozen=True)
class DataFile:
  """Holds a regular file as it was when it was opened; refuses to read it once it has changed."""

  path: Path
  size: int
  stamp: tuple[int, ...]

  @classmethod
  def open(cls, path: Path) -> DataFile:
    """Opens a file. Raises: FormatError when it is not a regular file, or a pointer of Git LFS."""
    with files.open_regular(path) as file:
      about = os.fstat(file.fileno())
      files.refuse_pointer(path, files.read_at(file, path, 0, len(files.POINTER)))
    return cls(path, about.st_size, _stamp(about))

  def read(self, start: int, count: int) -> bytes:
    """Returns `count` bytes from byte `start`.

    Raises: MalformedError when the file ends before; FormatError when it has changed.
    """
    if start < 0 or count < 0 or start + count > self.size:
      raise MalformedError("the file ends too early")
    with files.open_regular(self.path) as file:
      self._same(os.fstat(file.fileno()))
      data = files.read_at(file, self.path, start, count)
    if len(data) < count:
      raise MalformedError("the file ends too early")
    return data

  def map(self, dtype: np.dtype, start: int, count: int, big_endian: bool = False) -> np.ndarray:
    """Returns `count` items of `dtype` from byte `start`, as a view of the file if possible.

    `big_endian` is the order of bytes in the file; the result has the machine's.

    Raises: FormatError when the file has changed since it was opened.
    """
    if not count:
      return np.zeros(0, dtype)
    with files.open_regular(self.path) as file:
      self._same(os.fstat(file.fileno()))
      stored = np.dtype(f"{'>' if big_endian else '<'}u{dtype.itemsize}")
      try:
        mapped = np.memmap(file, stored, "r", start, (count,))
      except OSError as error:
        raise FormatError(f"{self.path}: cannot be mapped ({error.strerror})") from None
    native = stored.newbyteorder("=")
    if stored != native or start % dtype.itemsize:
      return mapped.astype(native).view(dtype)
    return mapped.view(dtype)

  def _same(self, about: os.stat_result) -> None:
    if _stamp(about) != self.stamp:
      raise FormatError(f"{self.path}: has changed since it was opened; start again")


def _stamp(about: os.stat_result) -> tuple[int, ...]:
  return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns
