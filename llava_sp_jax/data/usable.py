"""Remembers with which samples a run has begun, so that its rows stay the same when it resumes.

A picture that was missing may come back, and another one may go. Rows are planned from the sizes of all
samples, so either would move all rows that follow.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llava_sp_jax import storage
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import kept
from llava_sp_jax.data.measured import Measured


class Note(NamedTuple):
  """Holds what a run has begun with: {index: why} of what cannot be used, and the hash of all sizes."""

  errors: Mapping[int, str]
  digest: str
  changed: bool = False  # since the run began, as its user has allowed

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns the note as arrays by name, for a file."""
    errors = json.dumps(sorted(self.errors.items()))
    values = {"errors": errors, "digest": self.digest, "changed": self.changed}
    return {name: np.array(value) for name, value in values.items()}


class Usable:
  """Notes which samples a run cannot use, for each measuring of them (`Lengths.key`).

  All pipelines of a run share one. Notes are files `unusable-KEY.npz` in the run folder.
  """

  def __init__(
    self,
    folder: Path | None = None,
    resumed: bool = False,
    writes: bool = True,
    may_change: bool = False,
  ):
    """Reads which notes there are.

    Args:
      folder: the run folder; None keeps the notes in memory.
      resumed: whether the run has trained already; otherwise, notes of earlier attempts do not count.
      writes: whether this process writes the notes of the run.
      may_change: whether the run may go on with other samples than those that it began with.
    """
    self._folder, self._resumed, self._writes, self._may_change = (
      folder,
      resumed,
      writes,
      may_change,
    )
    self._notes, self._waiting = dict[str, Note](), list[str]()
    self._begun, self._lock = False, threading.RLock()
    # A former version left none: then nothing says that the samples of the kept sizes are others now.
    self._unknown = resumed and folder is not None and not any(folder.glob("unusable-*"))

  @property
  def changed(self) -> bool:
    """Returns whether the run reads, or has read, other samples than those that it began with."""
    return any(note.changed for note in self._notes.values())

  @property
  def unknown(self) -> bool:
    """Returns whether a former version has begun this run, and has left no notes."""
    return self._unknown

  def may_measure_again(self, key: str) -> bool:
    """Returns whether those samples may be measured again that could not be used."""
    with self._lock:
      return not self._unknown and self._note(key) is None

  def settle(self, key: str, found: Measured, where: str) -> Measured:
    """Returns the sizes for the run: without the samples that its note names, or as found.

    Without a note, it makes one.

    Args:
      key: of the measuring.
      found: the sizes of now.
      where: the data, for messages.

    Raises: ConfigError when the sizes are not those of the note, and may not change.
    """
    with self._lock:
      note = self._note(key)
      result = found.without(note.errors) if note else found
      changed = note is not None and note.digest != result.digest()
      if note and changed and not self._may_change:
        more = sorted(found.errors.keys() - note.errors.keys())
        first = f"; sample {more[0]}: {found.errors[more[0]]}" if more else ""
        raise ConfigError(
          f"{where}: the samples are not measured as when this run began ({len(more):,} more cannot "
          f"be used{first}), so its rows would be others. Restore them, and remove "
          f"lengths-{key}.npz from the run's folder and the folder {kept.SUFFIX} beside the data; "
          "or go on with other rows: --allow-changed data"
        )
      if note is None or changed:
        self._notes[key] = Note(dict(result.errors), result.digest(), changed)
        self._waiting.append(key)
        if self._begun:
          self.begin()
      return result

  def begin(self) -> None:
    """Writes the notes to the run folder, from now on at once. Raises: OSError, which names the file.

    A run that is refused before leaves those of an earlier start as they are; one that begins anew
    removes them.
    """
    with self._lock:
      first, self._begun = not self._begun, True
      if not self._folder or not self._writes:
        return
      own = set(map(self._path, self._notes))
      for file in self._folder.glob("unusable-*") if first and not self._resumed else ():
        if file not in own:
          storage.of(file).remove(file)
      while self._waiting:
        kept.save(self._path(self._waiting[0]), self._notes[self._waiting[0]].arrays())
        del self._waiting[0]

  def digests(self) -> dict[str, str]:
    """Returns the hash of the sizes of each measuring, for other processes to compare."""
    with self._lock:
      return {key: note.digest for key, note in self._notes.items()}

  def _path(self, key: str) -> Path:
    assert self._folder
    return self._folder / f"unusable-{key}.npz"

  def _note(self, key: str) -> Note | None:
    if key not in self._notes and self._folder and self._resumed:
      path = self._path(key)
      if found := _read(storage.of(path).content(path)):  # errors of the disk are raised
        self._notes[key] = found
    return self._notes.get(key)


def _read(content: bytes) -> Note | None:
  """Returns the note in the content of a file; None if it is damaged in any way."""
  found = kept.arrays(content) or {}
  try:
    errors = {int(i): str(error) for i, error in json.loads(str(found["errors"]))}
    return Note(errors, str(found["digest"]), bool(found["changed"]))
  except (KeyError, ValueError, TypeError):
    return None
