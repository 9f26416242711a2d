"""Writes files on a file system, which renames, appends and syncs."""

from __future__ import annotations

import functools
import os
import shutil
import uuid
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

from llava_sp_jax.stores.store import Opened, Seen, named


class Disk:
  """Writes files on a file system; see `Store`."""

  def make(self, folder: Path) -> list[Path]:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing

  def put(self, path: Path, data: bytes) -> None:
    # Hosts that share a folder may share process ids (containers count from 1).
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
      with named(path):
        part.write_bytes(data)
        part.replace(path)
    finally:
      part.unlink(missing_ok=True)

  def create(self, path: Path, data: bytes) -> bool:
    try:
      place = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
      return False
    try:
      with os.fdopen(place, "wb") as file:
        file.write(data)
    except OSError:  # the disk is full
      path.unlink()
      raise
    return True

  def overwrite(self, path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
      file.write(data)

  def append(self, path: Path, data: bytes) -> None:
    with named(path), path.open("ab") as file:
      file.write(data)

  def content(self, path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""

  def secure(self, path: Path) -> None:
    if path.is_file():
      with named(path), path.open("a") as file:
        os.fsync(file.fileno())

  def flush(self) -> None:
    pass  # appended at once

  def look(self, path: Path) -> Seen | None:
    try:
      with path.open("rb") as file:
        content, about = file.read(1 << 16), os.fstat(file.fileno())
    except FileNotFoundError:
      return None
    return Seen(content, (about.st_ino, about.st_mtime_ns))

  def read(self, path: Path, limit: int) -> bytes:
    with named(path), path.open("rb") as file:
      return file.read(limit)

  def opened(self, path: Path) -> Opened:
    with named(path):
      handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
      about = os.fstat(handle)

    def read_at(start: int, count: int) -> bytes:
      with named(path):
        return os.pread(handle, count, start)

    def begin_at(start: int, count: int) -> Callable[[], bytes]:
      return functools.partial(read_at, start, count)

    found = Opened(path, about.st_size, about.st_mtime_ns, begin_at)
    weakref.finalize(found, os.close, handle)
    return found

  def stamps(self, paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    found = [path.stat() if path.is_file() else None for path in paths]
    return [about and (about.st_size, about.st_mtime_ns) for about in found]

  def changed(self, path: Path) -> int:
    return path.stat().st_mtime_ns

  def remove(self, path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink(missing_ok=True)

  def move(self, path: Path, to: Path) -> None:
    to.parent.mkdir(exist_ok=True)
    path.rename(to)

  def scratch(self, folder: Path) -> Path:
    return folder

  def upload(self, scratch: Path, folder: Path) -> None:
    pass  # made in place

  def local(self, path: Path) -> Path:
    return path

  def versions(self, path: Path) -> dict[str, str]:
    return {}
