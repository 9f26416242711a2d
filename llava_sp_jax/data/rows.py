"""Makes the arrays of a row from its samples, and says which samples those are.

Shape letters:  B rows . T row length . M tiles per row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import ConfigError, lookup
from llava_sp_jax.data import example, image, kept, packing, pictures, samples
from llava_sp_jax.data.failure import SampleError, SourceError, attempt
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.data.source import Source

HOPELESS = 256  # so many bad samples in a row are no fault of theirs: settings, disk or network
SAMPLES = "samples"  # key of a batch: for each row, a list of Held; stays on the host


class Held(NamedTuple):
  """Identifies a sample that was planned into a row."""

  epoch: int
  sample: int  # its index in the source
  trained: bool  # False if it could not be read, and is missing from the row
  source: str = ""  # its name in a mixture


class RowMaker:
  """Reads the samples of a row; quarantines one that cannot be used and leaves it out."""

  def __init__(
    self,
    source: Source,
    writer: samples.SampleEncoder,
    data: config_lib.DataConfig,
    side: int,
    seed: int,
    quarantine: Quarantine,
    name: str = "",
  ):
    self._source, self._writer, self._data, self._side = source, writer, data, side
    self._seed, self._quarantine = seed, quarantine
    self._name = name  # of the source in a mixture
    self._augment = lookup("data.augment", data.augment, image.AUGMENTS)
    self._any_good, self._bad = False, set[int]()

  @property
  def image_bytes(self) -> int:
    """Returns the bytes of a row's images."""
    return self._data.images_per_row * self._side**2 * 3 * np.dtype(np.float32).itemsize

  @property
  def far(self) -> bool:
    """Returns whether rows are better loaded by more threads than make them."""
    return self._source.far

  def begin(self, epoch: int, row: packing.PackedRow) -> Callable[[], list[Any]]:
    """Reads the samples of a row, and begins to read the files of their pictures.

    Returns what waits for the samples with the content of those files.
    """
    begun = [self._begun(index) for index in row.samples]
    return lambda: [wait() for wait in begun]

  def _begun(self, index: int) -> Callable[[], Any]:
    return pictures.begin(attempt(lambda: self._source[index]), self._source.pictures)

  def __call__(
    self, epoch: int, row: packing.PackedRow, loaded: Sequence[Any] = ()
  ) -> dict[str, Any]:
    """Returns the arrays of a row by name: those of `make` without the axis B.

    `epoch` seeds random draws. `loaded` is what `begin` has led to; without it, it is read now.

    Raises: ConfigError when none of the first 256 samples can be used, SourceError when none of so many
      in a row can be used later: then not the samples are bad.
    """
    room = self._data.images_per_row
    images = np.zeros((room, self._side, self._side, 3), np.float32)
    parts: list[example.TokenRow] = []
    held: list[Held] = []
    first = 0
    for segment, index in enumerate(row.samples, 1):
      left = row.length - sum(part.length for part in parts)
      given = loaded[segment - 1] if loaded else None
      made = self._sample(epoch, index, given, segment, first, left)
      held.append(Held(epoch, index, made is not None, self._name))
      if made is not None:
        part, tiles = made
        parts.append(part)
        for pixels in tiles:
          images[first] = pixels
          first += 1
    return {**example.join(parts, row.length).arrays(), "images": images, SAMPLES: held}

  def _sample(
    self, epoch: int, index: int, given: Any, segment: int, first: int, left: int
  ) -> tuple[example.TokenRow, list[np.ndarray]] | None:
    made = attempt(lambda: self._made(epoch, index, given, segment, first, left))
    if isinstance(made, SampleError):
      self._quarantine.add(index, attempt(lambda: self._source[index]), made, self._name)
      self._give_up_if_hopeless(index, made)
      return None
    self._any_good = True
    self._bad.clear()
    return made

  def _made(
    self, epoch: int, index: int, given: Any, segment: int, first: int, left: int
  ) -> tuple[example.TokenRow, list[np.ndarray]]:
    sample = self._source[index] if given is None else given
    rng = samples.rng_of(self._seed, epoch, index)
    runs = self._writer.runs(sample, rng)
    images = self._source.images(sample)
    plans = [one.plan for one in images]
    size = self._writer.size(runs, plans)
    if size.length > left or first + size.tiles > self._data.images_per_row:
      raise SampleError(
        f"{size.length} tokens and {size.tiles} tiles, more than when samples were measured; if "
        "images have changed since, remove lengths-*.npz from the run's folder, and from the folder "
        f"{kept.SUFFIX} beside the data, and start anew"
      )
    limit, room = self._data.row_length, self._data.images_per_row
    part = example.layout(runs, plans, limit, room, segment, first)
    return part, [self._augment(tile, rng) for one in images for tile in one.tiles]

  def _give_up_if_hopeless(self, index: int, error: SampleError) -> None:
    self._bad.add(index)
    if len(self._bad) < min(len(self._source), HOPELESS):
      return
    where = f"data.mixture: {self._name}" if self._name else "data"
    if not self._any_good:
      raise ConfigError(
        f"{where}: none of the first {len(self._bad)} samples can be used; the last: {error}"
      ) from None
    raise SourceError(
      f"{where}: none of the last {len(self._bad)} samples could be used, so the disk or the network "
      f"is in doubt, not they; the last: {error}. The run goes on from its last checkpoint"
    ) from None


class MixedMaker:
  """Makes the rows of a mixture: each with the `RowMaker` of its source."""

  def __init__(self, makers: Sequence[RowMaker]):
    self._makers = makers

  @property
  def image_bytes(self) -> int:
    """Returns the bytes of a row's images."""
    return self._makers[0].image_bytes

  @property
  def far(self) -> bool:
    """Returns whether rows of any source are better loaded by more threads than make them."""
    return any(maker.far for maker in self._makers)

  def begin(self, part: int, epoch: int, row: packing.PackedRow) -> Callable[[], list[Any]]:
    """Begins to read a row of source `part`, as `RowMaker` does."""
    return self._makers[part].begin(epoch, row)

  def __call__(
    self, part: int, epoch: int, row: packing.PackedRow, loaded: Sequence[Any] = ()
  ) -> dict[str, Any]:
    """Returns the arrays of a row of source `part`, as `RowMaker` does."""
    return self._makers[part](epoch, row, loaded)


def marks(held: Sequence[Sequence[Held]]) -> np.ndarray:
  """Encodes SAMPLES of a batch for the ledger as int32 [B, n], n the most samples of a row.

  A trained sample is its index, one that could not be read is `-2 - index`, and padding is -1.
  """
  result = np.full((len(held), max(map(len, held), default=0)), -1, np.int32)
  for row, samples_ in zip(result, held, strict=True):
    row[: len(samples_)] = [h.sample if h.trained else -2 - h.sample for h in samples_]
  return result


def names(held: Sequence[Sequence[Held]]) -> list[str]:
  """Returns the name of the source of each row of a batch; "" without a mixture, or a sample."""
  return [row[0].source if row else "" for row in held]
