"""Builds the data pipeline: shuffled, packed, prefetched, seekable batches of static shapes.

Shape letters:  B rows . T row length . M tiles per row
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import ConfigError, lookup
from llava_sp_jax.data import anyres, image, mixture, packing, samples, validation_split
from llava_sp_jax.data.lengths import Hosts, Lengths, Say
from llava_sp_jax.data.prefetch import Ahead, Prefetcher
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.data.rows import SAMPLES, Held, MixedMaker, RowMaker, marks
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.data.usable import Usable

__all__ = ["SAMPLES", "Batches", "Held", "check_settings", "make", "marks", "open_parts"]

PREFETCH = 64  # rows that are made ahead of the batch that is read, at most
# Threads that read samples and pictures which are far away, for each one that makes rows, and at
# most: they mostly wait. Those that wait for no good reason cost a core its caches.
READERS, MOST_READERS = 16, 64
PREFETCH_BYTES = 1 << 26  # of their images; but always the rows of a batch


class Stream(Protocol):
  """Provides the endless sequence of rows: for each, the arguments with which it is made."""

  def __getitem__(self, row: int) -> tuple[Any, ...]: ...
  def epoch_rows(self) -> int:
    """Returns the number of rows of an epoch."""
    ...


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
    stream: Stream,
    row_maker: RowMaker | MixedMaker,
    batch_size: int,
    rows: Sequence[int],
    threads: int,
    usable: Mapping[str, np.ndarray],
  ):
    """Starts at step 0.

    Args:
      stream: the rows of all epochs.
      row_maker: makes the arrays of a row.
      batch_size: B, the rows of a batch over all processes.
      rows: the indices, within a batch, of the rows that this process makes.
      threads: threads that make rows.
      usable: indices of the samples of an epoch, for each source of a mixture by name; "" is
        the name of a single one.
    """
    super().__init__()
    self.stream, self.usable = stream, usable
    self.stopped: Callable[[], bool] = lambda: False
    self._batch_size, self._count, self._threads = batch_size, len(rows), threads
    fitting = PREFETCH_BYTES // max(1, row_maker.image_bytes)
    self._ahead = max(len(rows), min(PREFETCH, fitting))
    self._prefetcher: Prefetcher | None = None

    def planned(number: int) -> tuple[Any, ...]:  # `number` counts the rows that this process makes
      step, place = divmod(number, len(rows))
      return stream[step * batch_size + int(rows[place])]

    def row(number: int, *loaded: Any) -> dict[str, Any]:
      return row_maker(*planned(number), *loaded)

    self._row = row
    readers = min(READERS * max(1, threads), MOST_READERS)
    ahead = Ahead(lambda number: row_maker.begin(*planned(number)), readers)
    self._far = ahead if row_maker.far else None
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

  def resume(self, step: int, known: Mapping[str, Any] | None) -> None:
    """Moves to where a run has read `step` batches, of which a mixture's state was `known`."""
    if step and isinstance(self.stream, mixture.Stream):
      self.stream.resume(known, step * self._batch_size)
    self.seek(step)

  def mixture(self) -> dict[str, Any] | None:
    """Returns the state of a mixture, for `resume`; None without one."""
    return self.stream.state() if isinstance(self.stream, mixture.Stream) else None

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
        self._row, self._position * self._count, self._threads, self._ahead, self._far
      )
    batch: dict[str, Any] = {}
    held = []
    for place in range(self._count):  # each row is copied, and dropped, before the next is taken
      row = self._prefetcher.take(self.stopped)
      held.append(row.pop(SAMPLES))
      if not place:
        batch = {
          key: np.empty((self._count, *value.shape), value.dtype) for key, value in row.items()
        }
      for key, value in row.items():
        batch[key][place] = value
    self._position += 1
    return {**batch, SAMPLES: held}

  def get_state(self) -> dict[str, Any]:
    """Returns {"step": number of batches that were returned}, for grain's protocol of iterators."""
    return {"step": self._position}

  def set_state(self, state: dict[str, Any]) -> None:
    """Moves to the position of a state that `get_state` returned."""
    self.seek(int(state["step"]))


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


def open_parts(data: config_lib.DataConfig, tile: anyres.Tile, split: str) -> list[mixture.Part]:
  """Opens the sources of a split: one, or those of a mixture.

  Raises: ConfigError, FileNotFoundError for data that cannot be opened.
  """
  return mixture.open_parts(data, anyres.Reader(data, tile), split)


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
  usable: Usable | None = None,
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
    usable: remembers with which samples the run has begun (None: nothing is known of it).

  Raises: ConfigError, FileNotFoundError for settings and data that cannot be used.
  """
  check_settings(data)
  parts = open_parts(data, tile, split)
  packed = packing.PACKINGS[data.packing]
  shape = packing.Shape(
    data.row_length,
    data.images_per_row,
    batch_size,
    data.bucket_lengths,
    data.samples_per_batch,
    data.samples_per_row,
  )
  rows = range(batch_size) if rows is None else rows
  quarantine = quarantine or Quarantine()
  main = 0 in rows  # every process finds the same bad samples; one of them records them
  streams, makers, found = list[packing.Stream](), list[RowMaker](), list[np.ndarray]()
  for part in parts:
    own = mixture.seed_of(seed, part.name)
    lengths = Lengths(
      part.source,
      tokenizer,
      part.data,
      tile,
      own,
      quarantine if main else Quarantine(),
      folder,
      say if main else None,
      hosts,
      part.name,
      usable,
    )
    sizes = functools.partial(_sizes, _indices(part.members), packed, lengths)
    streams.append(packing.Stream(packed, shape, own, sizes))
    first = streams[-1].epoch(0)
    if say and main and packed.measured:
      used = packing.fill(first, sizes(0))
      of = f" of {part.name}" * bool(part.name)
      say(f"packing {data.packing}: {len(first):,} rows{of} in the first epoch, {used:.1%} full")
    found.append(sizes(0).usable)
    writer = samples.SampleEncoder(tokenizer, part.data)
    makers.append(RowMaker(part.source, writer, part.data, tile.size, own, quarantine, part.name))
  if not parts[0].name:
    return Batches(streams[0], makers[0], batch_size, rows, data.threads, {"": found[0]})
  mixed = mixture.Stream(parts, streams, batch_size if packed.batched else 1)
  maker = MixedMaker(makers)
  names = [part.name for part in parts]
  members = dict(zip(names, found, strict=True))
  return Batches(mixed, maker, batch_size, rows, data.threads, members)


def _indices(members: Sequence[int]) -> np.ndarray:
  """Returns the indices of samples as an array; at once for all of them."""
  every = isinstance(members, range)
  return np.arange(len(members), dtype=np.int32) if every else np.asarray(members, np.int32)


def _sizes(
  members: np.ndarray, packed: packing.Packing, lengths: Lengths, epoch: int
) -> packing.Sizes:
  """Returns the sizes of the samples of an epoch, of which `members` are in the split."""
  if not packed.measured:
    unknown = np.zeros(0, np.int32)
    return packing.Sizes(unknown, unknown, members)
  found = lengths.sizes(epoch)
  if len(members) == len(found.lengths):
    return found
  return dataclasses.replace(found, usable=np.intersect1d(found.usable, members))
