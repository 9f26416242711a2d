"""Builds the data pipeline: shuffled, packed, prefetched, seekable batches of static shapes.

Shape letters:  B rows . T row length . M tiles per row
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import ConfigError, lookup
from llava_sp_jax.data import (
  anyres,
  example,
  image,
  kept,
  packing,
  samples,
  sources,
  validation_split,
)
from llava_sp_jax.data.failure import SampleError, attempt
from llava_sp_jax.data.lengths import Hosts, Lengths, Say
from llava_sp_jax.data.prefetch import Prefetcher
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.data.source import Source
from llava_sp_jax.data.tokenizer import Tokenizer

HOPELESS = 256  # so many bad samples without a good one mean that the settings are wrong
PREFETCH = 64  # rows that are made ahead of the batch that is read, at most
PREFETCH_BYTES = 1 << 27  # of their images; but always the rows of a batch
SAMPLES = "samples"  # key of a batch: for each row, a list of Held; stays on the host


class Held(NamedTuple):
  """Identifies a sample that was planned into a row."""

  epoch: int
  sample: int  # its index in the source
  trained: bool  # False if it could not be read, and is missing from the row


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
  ):
    self._source, self._writer, self._data, self._side = source, writer, data, side
    self._seed, self._quarantine = seed, quarantine
    self._augment = lookup("data.augment", data.augment, image.AUGMENTS)
    self._any_good, self._bad = False, set[int]()

  @property
  def image_bytes(self) -> int:
    """Returns the bytes of a row's images."""
    return self._data.images_per_row * self._side**2 * 3 * np.dtype(np.float32).itemsize

  def __call__(self, epoch: int, row: packing.PackedRow) -> dict[str, Any]:
    """Returns the arrays of a row by name: those of `make` without the axis B.

    `epoch` seeds random draws.

    Raises: ConfigError when none of the first 256 samples can be used.
    """
    room = self._data.images_per_row
    images = np.zeros((room, self._side, self._side, 3), np.float32)
    parts: list[example.TokenRow] = []
    held: list[Held] = []
    first = 0
    for segment, index in enumerate(row.samples, 1):
      left = row.length - sum(part.length for part in parts)
      made = self._sample(epoch, index, segment, first, left)
      held.append(Held(epoch, index, made is not None))
      if made is not None:
        part, tiles = made
        parts.append(part)
        for pixels in tiles:
          images[first] = pixels
          first += 1
    return {**example.join(parts, row.length).arrays(), "images": images, SAMPLES: held}

  def _sample(
    self, epoch: int, index: int, segment: int, first: int, left: int
  ) -> tuple[example.TokenRow, list[np.ndarray]] | None:
    made = attempt(lambda: self._made(epoch, index, segment, first, left))
    if isinstance(made, SampleError):
      self._quarantine.add(index, attempt(lambda: self._source[index]), made)
      self._give_up_if_hopeless(index, made)
      return None
    self._any_good = True
    return made

  def _made(
    self, epoch: int, index: int, segment: int, first: int, left: int
  ) -> tuple[example.TokenRow, list[np.ndarray]]:
    sample = self._source[index]
    rng = samples.rng_of(self._seed, epoch, index)
    runs = self._writer.runs(sample, rng)
    pictures = self._source.images(sample)
    plans = [picture.plan for picture in pictures]
    size = self._writer.size(runs, plans)
    if size.length > left or first + size.tiles > self._data.images_per_row:
      raise SampleError(
        f"{size.length} tokens and {size.tiles} tiles, more than when samples were measured; if "
        "images have changed since, remove lengths-*.npz from the run's folder, and from the folder "
        f"{kept.SUFFIX} beside the data, and start anew"
      )
    limit, room = self._data.row_length, self._data.images_per_row
    part = example.layout(runs, plans, limit, room, segment, first)
    return part, [self._augment(tile, rng) for picture in pictures for tile in picture.tiles]

  def _give_up_if_hopeless(self, index: int, error: SampleError) -> None:
    if not self._any_good:
      self._bad.add(index)
      if len(self._bad) >= min(len(self._source), HOPELESS):
        raise ConfigError(
          f"data: none of the first {len(self._bad)} samples can be used; the last: {error}"
        ) from None


class Batches(grain.DatasetIterator):  # type: ignore[misc]  # grain has no types
  """Iterates endlessly over batches, from any step.

  Batch s holds rows s*B .. (s+1)*B-1 of the stream, of which each process makes some. The data of a
  step therefore depend neither on the number of processes nor on what was read before, and the step
  number is the whole state. While `__next__` waits for a batch it polls `stopped`.

  Rows are made by daemon threads rather than by grain's pools, whose threads keep a process from
  exiting while one hangs in a file system.
  """

  def __init__(
    self,
    stream: packing.Stream,
    row_maker: RowMaker,
    batch_size: int,
    rows: Sequence[int],
    threads: int,
    usable: Sequence[int],
  ):
    """Starts at step 0.

    Args:
      stream: the rows of all epochs.
      row_maker: makes the arrays of a row.
      batch_size: B, the rows of a batch over all processes.
      rows: the indices, within a batch, of the rows that this process makes.
      threads: threads that make rows.
      usable: indices of the samples of an epoch.
    """
    super().__init__()
    self.stream, self.usable = stream, usable
    self.stopped: Callable[[], bool] = lambda: False
    self._count, self._threads = len(rows), threads
    fitting = PREFETCH_BYTES // max(1, row_maker.image_bytes)
    self._ahead = max(len(rows), min(PREFETCH, fitting))
    self._prefetcher: Prefetcher | None = None

    def row(number: int) -> dict[str, Any]:  # `number` counts the rows that this process makes
      step, place = divmod(number, len(rows))
      return row_maker(*stream[step * batch_size + int(rows[place])])

    self._row = row
    self.seek(0)

  @property
  def position(self) -> int:
    """Returns the number of batches that were returned since the start of training."""
    return self._position

  def seek(self, step: int) -> None:
    """Moves the iterator to where `step` batches have been read."""
    self._position = step
    if self._prefetcher:
      self._prefetcher.close()
    self._prefetcher = None

  def close(self) -> None:
    """Stops the threads."""
    self.seek(self._position)
    super().close()

  def __next__(self) -> dict[str, Any]:
    """Returns the next batch, as described at `make`.

    Raises: Stopped when `stopped()` is true before the batch is ready; the position is undefined
      afterwards.
    """
    if self._prefetcher is None:
      self._prefetcher = Prefetcher(
        self._row, self._position * self._count, self._threads, self._ahead
      )
    rows = [self._prefetcher.take(self.stopped) for _ in range(self._count)]
    self._position += 1
    held = [row.pop(SAMPLES) for row in rows]
    return {**{key: np.stack([row[key] for row in rows]) for key in rows[0]}, SAMPLES: held}

  def get_state(self) -> dict[str, Any]:
    """Returns {"step": number of batches that were returned}, for grain's protocol of iterators."""
    return {"step": self._position}

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to the position of a state that `get_state` returned."""
    self.seek(int(state["step"]))


def marks(held: Sequence[Sequence[Held]]) -> np.ndarray:
  """Encodes SAMPLES of a batch for the ledger as int32 [B, n], n the most samples of a row.

  A trained sample is its index, one that could not be read is `-2 - index`, and padding is -1.
  """
  result = np.full((len(held), max(map(len, held), default=0)), -1, np.int32)
  for row, samples_ in zip(result, held, strict=True):
    row[: len(samples_)] = [h.sample if h.trained else -2 - h.sample for h in samples_]
  return result


def check_settings(data: config_lib.DataConfig) -> None:
  """Checks the settings of `data` that say how samples share rows.

  Raises: ConfigError for a packing or augmentation that does not exist, a bucket longer than a row,
    or a number of samples of a batch that the packing needs or does not keep.
  """
  packed = lookup("data.packing", data.packing, packing.PACKINGS)
  lookup("data.augment", data.augment, image.AUGMENTS)
  if beyond := [length for length in data.bucket_lengths if length > data.row_length]:
    raise ConfigError(
      f"data.bucket_lengths: {beyond[0]} tokens, but data.row_length is {data.row_length}"
    )
  if packed.counted != bool(data.samples_per_batch):
    counted = ", ".join(name for name, row in packing.PACKINGS.items() if row.counted)
    raise ConfigError(
      f"data.samples_per_batch: found {data.samples_per_batch} with data.packing={data.packing}; "
      f"expected at least 1 for {counted}, otherwise 0"
    )


def open_source(
  data: config_lib.DataConfig, tile: anyres.Tile, split: str
) -> tuple[Source, Sequence[int]]:
  """Opens the source of a split, and returns it with the indices of the split's samples.

  Raises: ConfigError, FileNotFoundError for data that cannot be opened.
  """
  source = sources.of(data, anyres.Reader(data, tile), split)
  return source, validation_split.samples(data, split, len(source))


def make(
  data: config_lib.DataConfig,
  tokenizer: Tokenizer,
  tile: anyres.Tile,
  batch_size: int,
  seed: int,
  quarantine: Quarantine | None = None,
  rows: Sequence[int] | None = None,
  split: str = validation_split.TRAIN,
  folder: Path | None = None,
  say: Say | None = None,
  hosts: Hosts | None = None,
) -> Batches:
  """Builds the batches of a split.

  A batch has tokens, targets, weights (float32), positions, segments, slots [B, T] int32, images
  [B, M, H, W, 3] float32, and SAMPLES for the host. T is `data.row_length` or the length of a
  bucket. For a packing that needs sizes, all samples are measured first.

  Args:
    data: the data settings of the run.
    tokenizer: the tokenizer of the run.
    tile: the tokens of one tile of the model.
    batch_size: B, the rows of a batch over all processes.
    seed: the seed of the run.
    quarantine: records samples that cannot be used.
    rows: the indices, within a batch, of the rows that this process makes (None: all).
    split: TRAIN or VALIDATION of `validation_split`.
    folder: where the sizes of samples are saved (None: nowhere).
    say: receives lines about progress.
    hosts: divides the measuring among the processes of a run (None: all is measured here).

  Raises: ConfigError, FileNotFoundError for settings and data that cannot be used.
  """
  check_settings(data)
  packed = packing.PACKINGS[data.packing]
  source, members = open_source(data, tile, split)
  data = validation_split.of_split(data, split)
  writer = samples.SampleEncoder(tokenizer, data)
  shape = packing.Shape(
    data.row_length,
    data.images_per_row,
    batch_size,
    data.bucket_lengths,
    data.samples_per_batch,
    data.samples_per_row,
  )
  quarantine = quarantine or Quarantine()
  rows = range(batch_size) if rows is None else rows
  row_maker = RowMaker(source, writer, data, tile.size, seed, quarantine)
  in_split = np.asarray(members, np.int32)
  if packed.measured:
    main = 0 in rows  # every process finds the same bad samples; one of them records them
    lengths = Lengths(
      source,
      tokenizer,
      data,
      tile,
      seed,
      quarantine if main else Quarantine(),
      folder,
      say if main else None,
      hosts,
    )

    def sizes(epoch: int) -> packing.Sizes:
      found = lengths.sizes(epoch)
      return dataclasses.replace(found, usable=np.intersect1d(found.usable, in_split))

  else:
    main, unknown = False, np.zeros(0, np.int32)

    def sizes(epoch: int) -> packing.Sizes:
      return packing.Sizes(unknown, unknown, in_split)

  stream = packing.Stream(packed, shape, seed, sizes)
  first = stream.epoch(0)
  if say and main:
    used = packing.fill(first, sizes(0))
    say(f"packing {data.packing}: {len(first):,} rows in the first epoch, {used:.1%} full")
  usable = sizes(0).usable.tolist()
  return Batches(stream, row_maker, batch_size, rows, data.threads, usable)
