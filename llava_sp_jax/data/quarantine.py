"""Samples that could not be used: counted, written down with the reason, never silently lost."""

from __future__ import annotations

import contextlib
import json
import threading
from pathlib import Path
from typing import Any


class Quarantine:
  """Counts samples that could not be used and writes each to a file, once in the life of a run."""

  def __init__(self, path: Path | None = None, process: int = 0):
    """Each process writes a file of its own; `path` is the first one's."""
    self._lock, self._seen, self._path = threading.Lock(), set[int](), path
    if path:
      self._path = path.with_stem(f"{path.stem}-{process:05d}") if process else path
      for file in path.parent.glob(f"{path.stem}*{path.suffix}"):
        self._seen |= _indices(file)

  def __contains__(self, index: int) -> bool:
    return index in self._seen

  @property
  def count(self) -> int:
    return len(self._seen)

  def add(self, index: int, sample: Any, error: Exception) -> None:
    with self._lock:
      if index in self._seen:
        return
      self._seen.add(index)
      name = sample.get("id", "no id") if isinstance(sample, dict) else "not a dictionary"
      line = {"index": index, "id": name, "error": str(error)}
      if self._path:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
          file.write(json.dumps(line) + "\n")


def _indices(path: Path) -> set[int]:
  """Samples that an earlier call has written; a line cut off by a kill does not count."""
  found = set()
  for line in path.read_text().splitlines():
    with contextlib.suppress(json.JSONDecodeError):
      found.add(int(json.loads(line)["index"]))
  return found
