"""Holds the sizes of all samples of a data set: kept in a file, sent between hosts, compared."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llava_sp_jax.data import kept
from llava_sp_jax.data.packing import Sizes

SIZES = ("lengths", "totals", "tiles")  # arrays of `Measured`

Found = tuple[int, int, int, str]  # length, total, tiles, or (0, 0, 0, why it cannot be used)


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """Holds the sizes of all N samples; they are 0 for the samples in `errors`."""

  lengths: np.ndarray  # [N] int32, tokens in a row
  totals: np.ndarray  # [N] int32, tokens before truncation
  tiles: np.ndarray  # [N] int32
  errors: dict[int, str]  # index of a sample -> why it cannot be used

  @classmethod
  def empty(cls, count: int) -> Measured:
    """Returns the sizes of `count` samples of which none is measured yet."""
    return cls(**{name: np.zeros(count, np.int32) for name in SIZES}, errors={})

  @property
  def cut(self) -> int:
    """Returns how many samples are longer than a row, and therefore truncated."""
    return int(np.sum(self.totals > self.lengths))

  def fill(self, indices: Sequence[int] | np.ndarray, found: Sequence[Found]) -> None:
    """Sets the sizes of some samples."""
    for index, (length, total, tiles, error) in zip(indices, found, strict=True):
      self.lengths[index], self.totals[index], self.tiles[index] = length, total, tiles
      if error:
        self.errors[int(index)] = error

  def sizes(self) -> Sizes:
    """Returns the lengths in tokens, the tiles, and the indices of the usable samples.

    A sample is usable if its length is above 0; one that cannot be used has length 0.
    """
    usable = np.flatnonzero(self.lengths).astype(np.int32)
    return Sizes(self.lengths, self.tiles, usable)

  def digest(self) -> str:
    """Returns a hash, of 16 digits, of all from which rows are planned."""
    parts = (np.ascontiguousarray(values).data for values in (self.lengths, self.tiles))
    found = hashlib.sha256()
    for part in parts:
      found.update(part)
    return found.hexdigest()[:16]

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns all of it as arrays by name."""
    sizes = {name: getattr(self, name) for name in SIZES}
    return {**sizes, "errors": np.array(json.dumps(sorted(self.errors.items())))}

  @classmethod
  def of(cls, arrays: Mapping[str, np.ndarray]) -> Measured:
    """Returns what `arrays` has returned. Raises: KeyError, ValueError, TypeError for others."""
    return cls(**{name: arrays[name] for name in SIZES}, errors=_errors(arrays))

  def save(self, path: Path) -> None:
    """Writes a file atomically. Raises: OSError when it cannot be written; no part remains."""
    kept.save(path, self.arrays())

  @classmethod
  def load(cls, path: Path) -> Measured | None:
    """Reads the file of an earlier pass; returns None if it is damaged in any way."""
    try:
      return cls.of(kept.load(path) or {})
    except (KeyError, ValueError, TypeError):
      return None

  def without(self, errors: Mapping[int, str]) -> Measured:
    """Returns the sizes if the samples of `errors`, {index: why}, cannot be used either."""
    if errors.keys() <= self.errors.keys():
      return self
    indices = np.fromiter(errors, np.int64, len(errors))
    result = Measured(
      **{name: getattr(self, name).copy() for name in SIZES}, errors={**self.errors}
    )
    for name in SIZES:
      getattr(result, name)[indices] = 0
    result.errors.update(errors)
    return result

  def part(self, indices: np.ndarray) -> Measured:
    """Returns the sizes of some samples, in the order of `indices`, with all errors."""
    return Measured(**{name: getattr(self, name)[indices] for name in SIZES}, errors=self.errors)

  def text(self, share: np.ndarray) -> str:
    """Returns the sizes of the samples of a share, by their indices, as text for other processes."""
    file = io.BytesIO()
    np.savez_compressed(file, **self.part(share).arrays())  # type: ignore[arg-type]
    return base64.b64encode(file.getvalue()).decode()

  def join(self, texts: Sequence[str], shares: Sequence[np.ndarray]) -> None:
    """Sets what `text` has returned for the shares of all processes."""
    for text, share in zip(texts, shares, strict=True):
      with np.load(io.BytesIO(base64.b64decode(text))) as file:
        found = Measured.of({name: file[name] for name in file.files})
      self.replace(share, found)

  def replace(self, indices: np.ndarray, found: Measured) -> None:
    """Sets the sizes of the samples of `indices`, which `found` has in the same order."""
    for index in set(map(int, indices)) & self.errors.keys() if self.errors else ():
      del self.errors[index]
    for name in SIZES:
      getattr(self, name)[indices] = getattr(found, name)
    self.errors.update(found.errors)


def _errors(arrays: Mapping[str, np.ndarray]) -> dict[int, str]:
  return {int(i): str(error) for i, error in json.loads(str(arrays["errors"]))}
