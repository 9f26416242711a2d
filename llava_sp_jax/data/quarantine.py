"""Records samples that could not be used, with the reason, so that none is lost silently."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from llava_sp_jax import jsonl, storage
from llava_sp_jax.console import shortened
from llava_sp_jax.data.failure import REASON, attempt, reason


class Quarantine:
  """Counts samples that could not be used, and writes each to a file once in the life of a run."""

  def __init__(self, path: Path | None = None, process: int = 0):
    """Reads the samples that an earlier part of the run recorded.

    `path` is the file of process 0 (None: samples are only counted); process N > 0 writes a file
    beside it whose name ends in N.
    """
    self._lock, self._seen, self._path = threading.Lock(), set[int | tuple[str, int]](), path
    self._torn = False  # whether the file ends in an incomplete line
    if path:
      self._path = path.with_stem(f"{path.stem}-{process:05d}") if process else path
      for file in path.parent.glob(f"{path.stem}*{path.suffix}"):
        self._seen |= _indices(file)
      self._torn = storage.of(self._path).content(self._path)[-1:] not in (b"", b"\n")

  def __contains__(self, sample: int | tuple[str, int]) -> bool:
    return sample in self._seen  # an index, with the name of its source in a mixture

  def of(self, source: str) -> list[int]:
    """Returns the indices of the samples of a source; "" is that of a run without a mixture."""
    keys = [key if isinstance(key, tuple) else ("", key) for key in self._seen]
    return [index for name, index in keys if name == source]

  @property
  def count(self) -> int:
    """Returns how many different samples are recorded, also by earlier parts of the run."""
    return len(self._seen)

  def add(self, index: int, sample: Any, error: Exception, source: str = "") -> None:
    """Records the sample of an index with its error, unless that index is recorded already.

    `source` is the name of its source in a mixture.

    Raises: OSError, which names the file, when it cannot be written; the sample may be added again.
    """
    with self._lock:
      key = (source, index) if source else index
      if key in self._seen:
        return
      if self._path:
        storage.of(self._path).make(self._path.parent)
        line = {"index": index, "id": _name(sample), "error": reason(error)}
        line |= {"source": source} if source else {}
        torn, self._torn = self._torn, True  # until the line is complete
        jsonl.append(self._path, line, start="\n" * torn)
        self._torn = False
      self._seen.add(key)


def forget(path: Path) -> None:
  """Removes a quarantine file, with those that other processes have written beside it; no links."""
  for file in path.parent.glob(f"{path.stem}*{path.suffix}"):
    if file.is_file() and not os.path.islink(file):
      storage.of(file).remove(file)


def reasons(path: Path) -> list[str]:
  """Returns the reason of each sample in a quarantine file; skips lines that cannot be read."""
  errors = (record.get("error") for record in jsonl.read(path)[0])
  return [error for error in errors if isinstance(error, str)]


def _name(sample: Any) -> Any:
  """Returns the id of a sample, as a number, None, or text of at most REASON characters."""
  name = sample.get("id", "no id") if isinstance(sample, dict) else "not a dictionary"
  text = str(attempt(lambda: str(name)))  # an id may be any object
  return name if isinstance(name, int | None) and len(text) <= REASON else shortened(text, REASON)


def _indices(path: Path) -> set[int | tuple[str, int]]:
  """Returns the samples in a quarantine file; skips a line that a kill left incomplete."""
  found = ((record.get("source"), record.get("index")) for record in jsonl.read(path)[0])
  return {(str(name), at) if name else at for name, at in found if isinstance(at, int)}
