"""Reads foreign files: opens only regular files, and reads no more than was asked for.

A pipe, a socket or a device would block or never end. These, folders, dangling links and unreadable
files raise the same error of one line.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from llava_sp_jax.errors import LlavaSPError

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device",
          stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}  # fmt: skip
POINTER = b"version https://git-lfs"  # the beginning of a Git LFS pointer


class FormatError(LlavaSPError, ValueError):
  """Raised for a file that cannot be used; names the file and what was expected."""


def is_regular(path: Path) -> bool:
  """Returns whether `path` is a regular file that exists; False also for an impossible name."""
  try:
    return path.is_file()
  except (OSError, ValueError):
    return False


def open_regular(path: Path) -> BinaryIO:
  """Opens a regular file for reading, unbuffered and without blocking.

  Raises: FormatError when the file is missing, not regular, or unreadable.
  """
  try:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except FileNotFoundError:
    raise FormatError(f"{path}: no such file") from None
  except (OSError, ValueError) as error:
    raise FormatError(f"{str(path)[:200]!a}: cannot be opened ({_reason(error)})") from None
  kind = stat.S_IFMT(os.fstat(handle).st_mode)
  if kind != stat.S_IFREG:
    os.close(handle)
    raise FormatError(
      f"{path}: expected a regular file, found {_KINDS.get(kind, 'something else')}"
    )
  return open(handle, "rb", buffering=0)


def refuse_pointer(path: Path, data: bytes) -> None:
  """Raises FormatError when `data` is a Git LFS pointer instead of the file."""
  if data.startswith(POINTER):
    raise FormatError(f"{path}: a pointer of Git LFS, not the file itself; git lfs pull brings it")


def read(path: Path, limit: int) -> bytes:
  """Returns all bytes of a regular file.

  Raises: FormatError when it cannot be read, has more than `limit` bytes, or is a Git LFS pointer.
  """
  with open_regular(path) as file:
    size = os.fstat(file.fileno()).st_size
    if size > limit:
      raise FormatError(f"{path}: {size:,} bytes, expected at most {limit:,}")
    # Reads `size` bytes, not to the end: files in /proc report size 0 and may have no end.
    data = read_at(file, path, 0, size)
  refuse_pointer(path, data)
  return data


def read_at(file: BinaryIO, path: Path, start: int, count: int) -> bytes:
  """Returns `count` bytes from offset `start`, fewer at the end of the file.

  Raises: FormatError when the file cannot be read.
  """
  parts = []
  try:
    while count and (part := os.pread(file.fileno(), min(count, 1 << 30), start)):
      parts.append(part)
      start, count = start + len(part), count - len(part)
  except OSError as error:
    raise FormatError(f"{path}: cannot be read ({_reason(error)})") from None
  return b"".join(parts)


def _reason(error: Exception) -> str:
  return (isinstance(error, OSError) and error.strerror) or str(error)
