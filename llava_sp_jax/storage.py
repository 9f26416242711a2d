"""Knows where the files of a run are kept: on a disk, or in a bucket such as gs://name/run.

Paths of both kinds are read alike, as `pathlib` does (`place`). What writes them differs (`of`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from llava_sp_jax.stores.bucket import OPTIONS, Bucket
from llava_sp_jax.stores.disk import Disk
from llava_sp_jax.stores.store import StorageError, Store

__all__ = [
  "DISK",
  "SCHEMES",
  "StorageError",
  "Store",
  "absolute",
  "check",
  "filled",
  "of",
  "place",
  "remote",
]

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/+(.*)", re.DOTALL)  # pathlib makes // to /
DISK: Store = Disk()
# Scheme of an address -> (its store, the module that fsspec needs, the extra that installs it).
# Only schemes to which Orbax can write arrays.
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

  known = fsspec.config.conf
  for name in ("gs", "gcs"):  # one scheme, of which users may have set either
    known[name] = {**known.get("gcs", {}), **known.get(name, {}), **OPTIONS}


def remote(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is in a bucket."""
  return os.fspath(path).partition("://")[0] in SCHEMES


def check(folder: Path) -> None:
  """Does nothing on a disk. Raises: StorageError that says why a bucket cannot be reached."""
  if remote(folder):
    of(folder).look(folder / "config.json")  # any object, which need not exist


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
