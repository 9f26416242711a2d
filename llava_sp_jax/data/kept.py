"""Keeps what one pass over a data set has found beside the data, for the next start.

Results stand in the folder `PATH.index` beside the data set `PATH`. The name of each holds a hash
of all that it depends on. They may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax import storage

SUFFIX = ".index"  # of the folder beside the data
SMALL = 4096  # up to so many samples a pass takes seconds, and nothing is kept beside them


def beside(path: str | Path) -> Path:
  """Returns the folder for results about the file or folder `path`."""
  return storage.place(str(path).rstrip("/") + SUFFIX)


def key_of(*parts: Any) -> str:
  """Returns a hash, of 16 digits, of values that JSON can hold."""
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
  """Returns (name, bytes, time of the last change in nanoseconds) of files."""
  paths = list(files)
  found = storage.of(paths[0]).stamps(paths) if paths else []
  return [(path.name, *(stamp or (0, 0))) for path, stamp in zip(paths, found, strict=True)]


def save(path: Path, values: Mapping[str, Any]) -> None:
  """Writes arrays to a file atomically.

  Raises: OSError, which names the file, when it cannot be written; no part of it remains.
  """
  file, store = io.BytesIO(), storage.of(path)
  np.savez(file, **values)
  store.make(path.parent)
  store.put(path, file.getvalue())


def load(path: Path) -> dict[str, np.ndarray] | None:
  """Returns the arrays of a file; None if it cannot be read, or is damaged in any way."""
  try:
    return arrays(storage.of(path).content(path))
  except OSError:
    return None


def arrays(content: bytes) -> dict[str, np.ndarray] | None:
  """Returns the arrays of a file with that content; None if it is damaged in any way."""
  try:
    with np.load(io.BytesIO(content)) as file:
      return {name: file[name] for name in file.files}
  except Exception:
    return None


def save_in(folder: Path, name: str, values: Mapping[str, Any]) -> None:
  """Writes arrays to a folder that `beside` has returned, where that is possible."""
  with contextlib.suppress(OSError):
    save(folder / name, values)
