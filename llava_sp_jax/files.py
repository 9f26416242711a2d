"""Foreign files: only regular ones are opened, only as much is read as was asked for.

A pipe, a socket or a device would block or never end; a folder, a link that leads nowhere or a file
that may not be read ends in the same one line.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from llava_sp_jax.errors import LlavaSPError

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device",
          stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}  # fmt: skip
POINTER = b"version https://git-lfs"  # how such a file begins


class FormatError(LlavaSPError, ValueError):
  """A file that cannot be used; names the file and what was expected."""


def is_regular(path: Path) -> bool:
  """Whether a regular file is there; False for a name that no file can have."""
  try:
    return path.is_file()
  except (OSError, ValueError):
    return False


def open_regular(path: Path) -> BinaryIO:
  """Opens a regular file for reading, without a buffer and without waiting.

  Raises: FormatError when there is no such file, it is no regular one or cannot be read.
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
  """Raises: FormatError for what Git left of a large file that it keeps elsewhere."""
  if data.startswith(POINTER):
    raise FormatError(f"{path}: a pointer of Git LFS, not the file itself; git lfs pull brings it")


def read(path: Path, limit: int) -> bytes:
  """All bytes of a regular file. Raises: FormatError, also for a file of more than `limit` bytes."""
  with open_regular(path) as file:
    size = os.fstat(file.fileno()).st_size
    if size > limit:
      raise FormatError(f"{path}: {size:,} bytes, expected at most {limit:,}")
    # Not to the end: what /proc shows has no size, and may have no end.
    data = read_at(file, path, 0, size)
  refuse_pointer(path, data)
  return data


def read_at(file: BinaryIO, path: Path, start: int, count: int) -> bytes:
  """At most `count` bytes, fewer at the file's end. Raises: FormatError when it cannot be read."""
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
