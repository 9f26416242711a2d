"""Writes objects in a bucket, which has no rename, no append and no folders.

An object appears whole or not at all, and may be created on condition that there is none. So

- a file is put whole, which replaces it at once;
- lines that are appended stay in memory. The whole object is put again when the caller secures it,
  and every SECONDS, a large one less often. No reader ever sees half a line, and what was secured
  survives a kill;
- a folder is moved by copying its objects and removing the originals, its own files first: without
  those, such as the marker of a complete checkpoint, the rest counts as nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_sp_jax.stores.ranges import Ranges
from llava_sp_jax.stores.store import Opened, Seen, named

SECONDS = 15.0  # the time that an appended line is in memory only, but for large objects
# Bytes per second that may go into putting an object again and again: one above 1 MB waits longer,
# so that what a log costs grows with its length, not with the square of it.
RATE = 1 << 16
# fsspec's settings. Without the first, what other processes have written is not seen.
OPTIONS = {"use_listings_cache": False, "finalize_on_close": True}


class Bucket:
  """Writes objects in buckets of one scheme with `fsspec`, and reads ranges with TensorStore."""

  def __init__(self, scheme: str, clock: Callable[[], float] = time.monotonic):
    """Prepares a store; it opens nothing yet.

    Args:
      scheme: of its addresses, as `fsspec` knows it.
      clock: seconds, from any moment on, that never go back.
    """
    self._scheme, self._clock, self._ranges = scheme, clock, Ranges(scheme)
    # The first guards the fields for moments, so that who appends a line never waits for a request.
    # The second lets requests that write follow each other, and is taken before the first.
    self._lock, self._turn = threading.Lock(), threading.RLock()
    self._pending = dict[Path, bytes]()
    # What puts that failed have sent, by hash, and how many pending bytes each held. Each may arrive
    # at any time, so those bytes stay until a put is answered.
    self._sent: dict[Path, dict[bytes, int]] = {}
    self._due: dict[Path, float] = {}  # when the lines of an object are put at the latest
    self._thread: threading.Thread | None = None
    self._folders: list[Any] = []  # temporary ones, which live as long as this process
    self._copies: dict[str, tuple[Path, dict[str, str]]] = {}  # (local copy, versions of its files)

  @functools.cached_property
  def _files(self) -> Any:
    import fsspec

    return fsspec.filesystem(self._scheme, **OPTIONS)

  def make(self, folder: Path) -> list[Path]:
    return []  # an object needs no folder

  def put(self, path: Path, data: bytes) -> None:
    with self._turn:
      self._replace(path, data, len(self._pending.get(path, b"")))

  def _replace(self, path: Path, data: bytes, count: int) -> None:
    """Puts an object; the first `count` bytes that wait for it are in it, or of no use any more.

    They are dropped when the put is answered; lines that were appended meanwhile stay.
    """
    if count:
      with self._lock:
        self._sent.setdefault(path, {})[_hash(data)] = count
    with named(path):
      self._files.pipe_file(str(path), data)
    with self._lock:
      self._sent.pop(path, None)
      if left := self._pending.pop(path, b"")[count:]:
        self._pending[path] = left

  def create(self, path: Path, data: bytes) -> bool:
    try:
      with named(path):
        self._files.pipe_file(str(path), data, mode="create")
    except FileExistsError:
      # The request may have been sent twice, because the answer to the first one was lost.
      seen = self.look(path)
      return bool(data) and seen is not None and seen.content == data
    return True

  def overwrite(self, path: Path, data: bytes) -> None:
    with named(path):
      self._files.info(str(path))
      self._files.pipe_file(str(path), data)

  def append(self, path: Path, data: bytes) -> None:
    with self._lock:
      self._pending[path] = self._pending.get(path, b"") + data
      self._due.setdefault(path, self._clock() + SECONDS)
      if self._thread is None:
        self._thread = threading.Thread(target=self._keep_flushing, name="bucket", daemon=True)
        self._thread.start()

  def content(self, path: Path) -> bytes:
    with self._turn:
      return self._whole(path)[0]

  def _whole(self, path: Path) -> tuple[bytes, int]:
    """Returns the bytes of an object with those that wait for it, and how many wait."""
    seen = self.look(path)
    there = seen.content if seen else b""
    with self._lock:
      waiting, sent = self._pending.get(path, b""), self._sent.get(path)
      arrived = sent.get(_hash(there), 0) if sent else 0
    return there + waiting[arrived:], len(waiting)

  def secure(self, path: Path) -> None:
    with self._turn:
      whole, count = self._whole(path) if path in self._pending else (b"", 0)
      if not count:
        return
      self._replace(path, whole, count)
      with self._lock:
        self._due[path] = self._clock() + max(SECONDS, len(whole) / RATE)

  def flush(self) -> None:
    for path in self._waiting():
      self.secure(path)

  def _waiting(self) -> list[Path]:
    with self._lock:
      return list(self._pending)

  def _put_due(self) -> None:
    for path in self._waiting():
      if self._clock() >= self._due.get(path, 0.0):
        self.secure(path)

  def _keep_flushing(self) -> None:
    failing, ticks = False, threading.Event()
    while not ticks.wait(SECONDS / 2):
      try:
        self._put_due()
        failing = False
      except OSError as error:  # what is pending is kept, and tried again
        if not failing:
          print(f"llava-sp: WARNING: {error}; tried again", file=sys.stderr, flush=True)
        failing = True

  def look(self, path: Path) -> Seen | None:
    try:
      with named(path):
        about = self._files.info(str(path))
        content = self._files.cat_file(str(path)) if about["type"] == "file" else b""
    except FileNotFoundError:
      return None
    return Seen(content, (int(about.get("generation") or 0), 0))

  def read(self, path: Path, limit: int) -> bytes:
    with named(path):
      return bytes(self._files.cat_file(str(path), start=0, end=limit))

  def opened(self, path: Path) -> Opened:
    size, version = self._stamp(path)

    def begin_at(start: int, count: int) -> Callable[[], bytes]:
      end = min(start + count, size)
      return self._ranges.begin(path, start, end) if end > start else bytes

    return Opened(path, size, version, begin_at)

  def stamps(self, paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    known: dict[str, tuple[int, int]] = {}
    for folder in {path.parent for path in paths}:
      with named(folder), contextlib.suppress(FileNotFoundError):
        listed = self._files.ls(str(folder), detail=True)  # 1000 objects a request
        known |= {about["name"]: _stamp(about) for about in listed if about["type"] == "file"}
    return [known.get(_name(path)) for path in paths]

  def _stamp(self, path: Path) -> tuple[int, int]:
    with named(path):
      about = self._files.info(str(path))
      if about["type"] != "file":
        raise FileNotFoundError(errno.ENOENT, "no such object", str(path))
    return _stamp(about)

  def changed(self, path: Path) -> int:
    with named(path):
      return int(self._files.modified(str(path)).timestamp() * 1e9)

  def remove(self, path: Path) -> None:
    with self._turn, named(path):
      with self._lock:
        for name in [name for name in self._pending if path in (name, *name.parents)]:
          del self._pending[name]
          self._sent.pop(name, None)
          self._due.pop(name, None)
      with contextlib.suppress(FileNotFoundError):
        self._remove_all(path)

  def _remove_all(self, path: Path) -> None:
    for name in self._found(path):
      with contextlib.suppress(FileNotFoundError):
        self._files.rm_file(name)

  def _found(self, path: Path) -> list[str]:
    """Returns the objects at and below a path; those of the folder itself before those deeper."""
    found: list[str] = self._files.find(str(path))
    return sorted(found, key=lambda name: (name.count("/"), name))

  def move(self, path: Path, to: Path) -> None:
    with self._turn, named(path):
      for below in self._waiting():
        if path in (below, *below.parents):
          self.secure(below)
      for name in reversed(self._found(path)):
        self._files.cp_file(name, f"{to}{name[_start(path) :]}")
      self._remove_all(path)

  def scratch(self, folder: Path) -> Path:
    made = self._temporary() / folder.name
    made.mkdir()
    return made

  def _temporary(self) -> Path:
    self._folders.append(tempfile.TemporaryDirectory(prefix="llava-sp-"))
    return Path(self._folders[-1].name)

  def upload(self, scratch: Path, folder: Path) -> None:
    for path in sorted(scratch.rglob("*")):
      if path.is_file():
        self.put(folder / str(path.relative_to(scratch)), path.read_bytes())

  def local(self, path: Path) -> Path:
    if not (versions := self.versions(path)):
      raise FileNotFoundError(errno.ENOENT, "no such object or folder", str(path))
    copy, known = self._copies.get(str(path), (path, {}))
    if known != versions:
      copy = self._temporary() / path.name
      with named(path), _whole_or_gone(copy.parent):
        to = [f"{copy}{name}" for name in versions]
        for folder in {os.path.dirname(name) for name in to}:
          os.makedirs(folder, exist_ok=True)
        self._files.get([f"{path}{name}" for name in versions], to)
      self._copies[str(path)] = copy, versions
    return copy

  def versions(self, path: Path) -> dict[str, str]:
    with named(path):
      found = self._files.find(str(path), detail=True)
    marks = ("size", "md5Hash", "crc32c")  # a composed object has no MD5
    return {
      name[_start(path) :]: " ".join(str(about.get(mark)) for mark in marks)
      for name, about in sorted(found.items())
    }


@contextlib.contextmanager
def _whole_or_gone(folder: Path) -> Iterator[None]:
  """Removes a temporary folder if the block fails, which leaves a part of a copy in it."""
  try:
    yield
  except BaseException:
    shutil.rmtree(folder, ignore_errors=True)
    raise


def _hash(content: bytes) -> bytes:
  return hashlib.sha256(content).digest()


def _stamp(about: dict[str, Any]) -> tuple[int, int]:
  return int(about["size"]), int(about.get("generation") or 0)


def _name(path: Path) -> str:
  """Returns the name that fsspec has for a path, which has no scheme."""
  return str(path).partition("://")[2]


def _start(path: Path) -> int:
  """Returns where the part below `path` begins in a name of fsspec."""
  return len(_name(path))
