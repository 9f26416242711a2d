"""Knows how files are written where a run is kept: on a disk, or in a bucket such as gs://name/run.

A disk renames, appends and syncs. A bucket has none of these: an object appears whole or not at
all, and may be created on condition that there is none. So in a bucket

- a file is put whole, which replaces it at once;
- lines that are appended stay in memory, and the whole object is put again when the caller secures
  it, and every SECONDS. No reader ever sees half a line, and what was secured survives a kill;
- a folder is moved by copying its objects and removing the originals, its own files first: without
  those, such as the marker of a complete checkpoint, the rest counts as nothing.

Paths of both kinds are read alike, as `pathlib` does (`place`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

from llava_sp_jax.errors import LlavaSPError

SECONDS = 15.0  # the longest time that an appended line is in memory only
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)  # pathlib makes // to /


class StorageError(LlavaSPError, OSError):
  """Raised for an address that cannot be used; names it, and says what to do."""


@dataclasses.dataclass(frozen=True)
class Seen:
  """Holds a small file as it was read: its content, and what differs when it is written again."""

  content: bytes
  version: tuple[int, int]


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

    What is copied for it, into a temporary folder, is removed when this process ends. The same
    files are copied once.
    """
    ...

  def versions(self, path: Path) -> dict[str, str]:
    """Returns {name below `path`: text that changes with the file}, or {} where files must be read."""
    ...


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
      with _named(path):
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
    with _named(path), path.open("ab") as file:
      file.write(data)

  def content(self, path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""

  def secure(self, path: Path) -> None:
    if path.is_file():
      with _named(path), path.open("a") as file:
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


class Bucket:
  """Writes objects in buckets of one scheme, with `fsspec`; see `Store`."""

  def __init__(self, scheme: str):
    self._scheme = scheme
    self._lock, self._pending = threading.RLock(), dict[str, bytes]()
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
    with self._lock, _named(path):
      self._files.pipe_file(str(path), data)
      self._pending.pop(str(path), None)

  def create(self, path: Path, data: bytes) -> bool:
    try:
      with _named(path):
        self._files.pipe_file(str(path), data, mode="create")
    except FileExistsError:
      # The request may have been sent twice, because the answer to the first one was lost.
      seen = self.look(path)
      return bool(data) and seen is not None and seen.content == data
    return True

  def overwrite(self, path: Path, data: bytes) -> None:
    with _named(path):
      self._files.info(str(path))
      self._files.pipe_file(str(path), data)

  def append(self, path: Path, data: bytes) -> None:
    with self._lock:
      self._pending[str(path)] = self._pending.get(str(path), b"") + data
      if self._thread is None:
        self._thread = threading.Thread(target=self._keep_flushing, name="bucket", daemon=True)
        self._thread.start()

  def content(self, path: Path) -> bytes:
    with self._lock:
      seen = self.look(path)
      return (seen.content if seen else b"") + self._pending.get(str(path), b"")

  def secure(self, path: Path) -> None:
    with self._lock:
      if self._pending.get(str(path)):
        self.put(path, self.content(path))

  def flush(self) -> None:
    with self._lock:
      for name in list(self._pending):
        self.secure(place(name))

  def _keep_flushing(self) -> None:
    failing, ticks = False, threading.Event()
    while not ticks.wait(SECONDS):
      try:
        self.flush()
        failing = False
      except OSError as error:  # what is pending is kept, and tried again
        if not failing:
          print(f"llava-sp: WARNING: {error}; tried again", file=sys.stderr, flush=True)
        failing = True

  def look(self, path: Path) -> Seen | None:
    try:
      with _named(path):
        about = self._files.info(str(path))
        content = self._files.cat_file(str(path)) if about["type"] == "file" else b""
    except FileNotFoundError:
      return None
    return Seen(content, (int(about.get("generation") or 0), 0))

  def changed(self, path: Path) -> int:
    with _named(path):
      return int(self._files.modified(str(path)).timestamp() * 1e9)

  def remove(self, path: Path) -> None:
    with self._lock, _named(path):
      for name in [name for name in self._pending if (name + "/").startswith(f"{path}/")]:
        del self._pending[name]
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
    with _named(path):
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
      with _named(path):
        to = [f"{copy}{name}" for name in versions]
        for folder in {os.path.dirname(name) for name in to}:
          os.makedirs(folder, exist_ok=True)
        self._files.get([f"{path}{name}" for name in versions], to)
      self._copies[str(path)] = copy, versions
    return copy

  def versions(self, path: Path) -> dict[str, str]:
    with _named(path):
      found = self._files.find(str(path), detail=True)
    marks = ("size", "md5Hash", "crc32c")  # a composed object has no MD5
    return {
      name[_start(path) :]: " ".join(str(about.get(mark)) for mark in marks)
      for name, about in sorted(found.items())
    }


def _start(path: Path) -> int:
  """Returns where the part below `path` begins in a name of fsspec, which has no scheme."""
  return len(str(path).partition("://")[2])


# fsspec's settings of a bucket. Without the first, what other processes have written is not seen.
OPTIONS = {"use_listings_cache": False, "finalize_on_close": True}
DISK: Store = Disk()
# Scheme of an address -> (its store, the module that fsspec needs, the extra that installs it).
# Other schemes would need an Orbax that writes arrays there.
SCHEMES: dict[str, tuple[Store, str, str]] = {"gs": (Bucket("gs"), "gcsfs", "gcs")}


def place(text: str | os.PathLike[str]) -> Path:
  """Returns the path that a text names: on a disk, or in a bucket (`gs://bucket/folder`).

  A path in a bucket is an `epath.Path`: it reads, lists and joins as a `pathlib.Path` does.

  Raises: StorageError for a scheme that is unknown, or whose package is not installed.
  """
  text = os.fspath(text)
  address = _ADDRESS.fullmatch(text)
  if not address or (address[1] not in SCHEMES and "://" not in text):
    return Path(text)
  scheme = address[1]
  if scheme not in SCHEMES:
    known = ", ".join(f"{name}://" for name in SCHEMES)
    raise StorageError(f"{text}: unknown scheme {scheme}://; give a local folder, or {known}...")
  _, module, extra = SCHEMES[scheme]
  if not address[2].strip("/"):
    raise StorageError(f"{text}: names no bucket; give {scheme}://BUCKET/FOLDER")
  if importlib.util.find_spec(module) is None:
    raise StorageError(
      f"{text}: needs the package {module}, which is not installed; "
      f"pip install {module} (or llava-sp-jax[{extra}])"
    )
  _set_up()
  from etils import epath

  return cast(Path, epath.Path(f"{scheme}://{address[2].rstrip('/')}"))


@functools.cache
def _set_up() -> None:
  """Makes `epath`, and with it Orbax, use the same files as this module."""
  os.environ.setdefault("EPATH_USE_TF", "false")  # TensorFlow's, even where it is installed
  import fsspec

  for name in ("gs", "gcs"):
    fsspec.config.conf[name] = {**fsspec.config.conf.get("gcs", {}), **OPTIONS}


def remote(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is in a bucket."""
  return os.fspath(path).partition("://")[0] in SCHEMES


def absolute(path: Path) -> Path:
  """Returns a path on a disk from its root on; one in a bucket as it is."""
  return path if remote(path) else path.absolute()


def of(path: Path) -> Store:
  """Returns what writes files at a path."""
  return SCHEMES[os.fspath(path).partition("://")[0]][0] if remote(path) else DISK


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[Path]:
  """Yields a local folder in which the block makes the content of `folder`."""
  store = of(folder)
  store.make(folder)
  scratch = store.scratch(folder)
  yield scratch
  store.upload(scratch, folder)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
  """Adds `path` to an OSError of the block, and turns errors of other kinds into an OSError."""
  try:
    yield
  except OSError as error:
    number = error.errno if isinstance(error.errno, int) else errno.EIO
    number = {FileNotFoundError: errno.ENOENT, FileExistsError: errno.EEXIST}.get(
      type(error), number
    )
    raise OSError(number, error.strerror or str(error), str(path)) from error
  except Exception as error:  # of the libraries that reach a bucket
    if not remote(path):
      raise
    said = " ".join(str(error).split())
    raise StorageError(
      f"{path}: cannot be reached ({type(error).__name__}: {said:.300}); is the bucket there, and "
      "may this machine use it (gcloud auth application-default login)?"
    ) from error
