"""Gives libraries a file that is read by ranges of bytes, as they read one that is open."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

from llava_sp_jax import storage

BUFFER = 1 << 20  # bytes of a request where a file is read from its start to its end


class Ranged(io.RawIOBase):
  """Reads a file by ranges of bytes; has no buffer."""

  def __init__(self, path: Path):
    """Looks at the file. Raises: OSError that names it."""
    super().__init__()
    self._file, self._at = storage.of(path).opened(path), 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
    start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._file.size}[whence]
    self._at = max(0, start + offset)
    return self._at

  def tell(self) -> int:
    return self._at

  def readinto(self, buffer: Any, /) -> int:
    found = self._file.read_at(self._at, len(buffer))
    buffer[: len(found)] = found
    self._at += len(found)
    return len(found)


def buffered(path: Path) -> io.BufferedReader:
  """Opens a file that is read mostly in its order. Raises: OSError that names it."""
  return io.BufferedReader(Ranged(path), BUFFER)
