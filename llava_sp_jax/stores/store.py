"""Defines what every kind of storage does, and the errors of those that cannot be reached."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from llava_sp_jax.errors import LlavaSPError


class StorageError(LlavaSPError, OSError):
  """Raised for an address that cannot be used; names it, and says what to do."""


@dataclasses.dataclass(frozen=True)
class Seen:
  """Holds a small file as it was read: its content, and what differs when it is written again."""

  content: bytes
  version: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Opened:
  """Reads a large file at any offset; may be used by several threads.

  `begin_at(start, count)` begins to read and returns what waits for the bytes from `start`, fewer at
  the end of the file. Either raises an OSError that names the file.
  """

  path: Path
  size: int  # bytes
  version: int  # differs when the file is written again
  begin_at: Callable[[int, int], Callable[[], bytes]]

  def read_at(self, start: int, count: int) -> bytes:
    """Returns the bytes from `start`, fewer at the end. Raises: OSError that names the file."""
    return self.begin_at(start, count)()


class Store(Protocol):
  """Writes files at paths of one kind. Errors of all methods are OSErrors that name the path."""

  def make(self, folder: Path) -> list[Path]:
    """Makes a folder, if need be, and returns those that were made, the innermost first."""
    ...

  def put(self, path: Path, data: bytes) -> None:
    """Writes a file completely or not at all."""
    ...

  def create(self, path: Path, data: bytes) -> bool:
    """Writes a file unless it exists; returns False if it does. Of several writers, one succeeds."""
    ...

  def overwrite(self, path: Path, data: bytes) -> None:
    """Writes new content of the same size into a small file. Raises: OSError when there is none."""
    ...

  def append(self, path: Path, data: bytes) -> None:
    """Appends to a file, which `content` then has; others see it at the latest when it is secured."""
    ...

  def content(self, path: Path) -> bytes:
    """Returns the bytes of a file, with all that was appended; b"" if there is none."""
    ...

  def secure(self, path: Path) -> None:
    """Returns when all that was appended to a file survives a kill."""
    ...

  def flush(self) -> None:
    """Makes all that this process has appended to any file visible to others."""
    ...

  def look(self, path: Path) -> Seen | None:
    """Reads a small file; None if there is none."""
    ...

  def read(self, path: Path, limit: int) -> bytes:
    """Returns the first `limit` bytes of a file, in one request. Raises: OSError that names it."""
    ...

  def opened(self, path: Path) -> Opened:
    """Opens a file for reads at any offset, while the result is held. Raises: OSError."""
    ...

  def stamps(self, paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Returns (bytes, version) of files, in few requests; None for one that is no file."""
    ...

  def changed(self, path: Path) -> int:
    """Returns when a file was written, in nanoseconds since 1970. Raises: OSError without one."""
    ...

  def remove(self, path: Path) -> None:
    """Removes a file or folder, if it exists."""
    ...

  def move(self, path: Path, to: Path) -> None:
    """Moves a folder to a path that does not exist."""
    ...

  def scratch(self, folder: Path) -> Path:
    """Returns a local folder in which the content of `folder` is made; `upload` takes it there."""
    ...

  def upload(self, scratch: Path, folder: Path) -> None:
    """Puts all files of a folder that `scratch` has returned to their place."""
    ...

  def local(self, path: Path) -> Path:
    """Returns a local path with the file, or all files of the folder, at `path`, to be read only.

    What is copied for it, into a temporary folder, is removed when this process ends, unless it is
    killed. The same files are copied once.
    """
    ...

  def versions(self, path: Path) -> dict[str, str]:
    """Returns {name below `path`: text that changes with the file}, or {} where files must be read."""
    ...


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
  """Adds `path` to an OSError of the block, and turns errors of other kinds into an OSError."""
  try:
    yield
  except StorageError:
    raise
  except OSError as error:
    number = error.errno if isinstance(error.errno, int) else errno.EIO
    number = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST}.get(
      type(error), number
    )
    raise OSError(number, error.strerror or str(error), str(path)) from error
  except Exception as error:  # of the libraries that reach a bucket
    if "://" not in str(path):
      raise
    said = " ".join(str(error).split())
    raise StorageError(
      f"{path}: cannot be reached ({type(error).__name__}: {said:.300}); is the bucket there, and "
      "may this machine use it (gcloud auth application-default login)?"
    ) from error
