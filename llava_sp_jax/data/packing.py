"""Packs samples into rows, as a pure function of their sizes and the seed, equal on every host.

Each epoch is planned as a whole before it begins: samples are shuffled and grouped, and then the
rows are shuffled, so that neither long samples nor full rows come first. Row r of the endless
stream is therefore known without reading the rows before it, and a position in the data is a number
of rows, whatever the number of hosts.
"""

from __future__ import annotations

import array
import bisect
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from llava_sp_jax.config import DataConfig

WINDOW = 8192  # samples grouped at a time; a larger window packs no better (see the benchmark)
KEPT = 2  # epochs whose rows stay in memory: prefetching reaches into the next epoch


Order = Sequence[int] | np.ndarray  # indices of samples


@dataclasses.dataclass(frozen=True, eq=False)
class Sizes:
  """Holds the size of each of the N samples of a data set, and which of them can be used."""

  lengths: np.ndarray  # [N] int32, tokens in a row, image tokens included
  tiles: np.ndarray  # [N] int32
  usable: np.ndarray  # [U] int32, ascending


@dataclasses.dataclass(frozen=True)
class Shape:
  """Holds the room in rows and batches."""

  length: int  # tokens of a row
  tiles: int  # of a row
  batch: int  # rows of a batch
  buckets: tuple[int, ...] = ()  # static lengths, ascending; empty: quarters of `length`
  samples: int = 0  # of a batch, where the packing keeps their number
  most: int = 0  # samples of a row; 0: any number

  @property
  def bucket_lengths(self) -> tuple[int, ...]:
    """Returns the lengths of all buckets, ascending; the last is `length`."""
    quarters = [max(1, self.length * i // 4) for i in (1, 2, 3)]
    return tuple(sorted({*(self.buckets or quarters), self.length}))


@dataclasses.dataclass(frozen=True, slots=True)
class PackedRow:
  """Holds the indices of a row's samples, in their order, and the length of the row in tokens."""

  length: int
  samples: tuple[int, ...] = ()


class Rows(Sequence[PackedRow]):
  """Holds the rows of an epoch as arrays: their number is that of the samples, and so is not small.

  `order` has the rows, or groups of `size` rows, in the order in which they are read.
  """

  def __init__(
    self,
    lengths: np.ndarray,
    ends: Sequence[int] | np.ndarray,
    samples: np.ndarray,
    order: np.ndarray | None = None,
    size: int = 1,
  ):
    self.lengths, self.ends, self.samples = lengths, ends, samples
    self._order, self._size = order, size

  @classmethod
  def of(cls, rows: Iterable[PackedRow]) -> Rows:
    """Returns rows that are made one after another, and not held as objects."""
    lengths, ends, samples = array.array("i"), array.array("q"), array.array("i")
    for row in rows:
      lengths.append(row.length)
      samples.extend(row.samples)
      ends.append(len(samples))
    return cls(np.array(lengths, np.int32), np.array(ends, np.int64), np.array(samples, np.int32))

  def shuffled(self, rng: np.random.Generator, size: int) -> Rows:
    """Returns the whole groups of `size` rows in a random order; each group keeps its own."""
    order = rng.permutation(len(self.lengths) // size)
    return Rows(self.lengths, self.ends, self.samples, _small(order), size)

  def __len__(self) -> int:
    return len(self.lengths) if self._order is None else len(self._order) * self._size

  def __getitem__(self, index: Any) -> Any:
    if not 0 <= index < len(self):
      raise IndexError(index)
    if self._order is not None:
      group, inside = divmod(index, self._size)
      index = int(self._order[group]) * self._size + inside
    first = int(self.ends[index - 1]) if index else 0
    samples = self.samples[first : int(self.ends[index])]
    return PackedRow(int(self.lengths[index]), tuple(samples.tolist()))


def _small(numbers: np.ndarray) -> np.ndarray:
  """Returns whole numbers in 32 bits, if they fit."""
  return numbers.astype(np.int32) if len(numbers) < 1 << 31 else numbers


def one_each(order: Order, sizes: Sizes, shape: Shape) -> Rows:
  """Gives every sample of `order` a row of its own; does not read the sizes."""
  samples = np.asarray(order, np.int32)
  lengths = np.broadcast_to(np.int32(shape.length), samples.shape)
  return Rows(lengths, range(1, len(samples) + 1), samples)


def first_fit(order: Order, sizes: Sizes, shape: Shape) -> Iterator[PackedRow]:
  """Packs the longest sample first, each into the fullest row with space for it.

  A row has space for tokens, tiles and `shape.most` samples.

  Groups WINDOW (8192) samples of the shuffled `order` at a time, which limits how far samples of
  similar size are drawn together.
  """
  for start in range(0, len(order), WINDOW):
    part = np.asarray(order[start : start + WINDOW])
    found = zip(
      part.tolist(), sizes.lengths[part].tolist(), sizes.tiles[part].tolist(), strict=True
    )
    window = sorted(found, key=lambda one: -one[1])  # stable
    held: list[list[int]] = []
    # room[tiles left in a row]: (tokens left, number of the row), ascending.
    room: list[list[tuple[int, int]]] = [[] for _ in range(shape.tiles + 1)]
    for i, length, count in window:
      best: tuple[int, int, int] | None = None
      for left in range(count, shape.tiles + 1):
        at = bisect.bisect_left(room[left], (length, 0))
        if at < len(room[left]) and (best is None or room[left][at][0] < best[0]):
          best = (*room[left][at], left)
      if best is None:
        free, row, left = shape.length, len(held), shape.tiles
        held.append([])
      else:
        free, row, left = best
        del room[left][bisect.bisect_left(room[left], (free, row))]
      held[row].append(i)
      if free > length and len(held[row]) != shape.most:
        bisect.insort(room[left - count], (free - length, row))
    yield from (PackedRow(shape.length, tuple(samples)) for samples in held)


def buckets(order: Order, sizes: Sizes, shape: Shape) -> Iterator[PackedRow]:
  """Gives every sample a row of the shortest bucket that holds it, in batches of one bucket.

  Moves samples that do not fill a batch to the next longer bucket; fills the last batch of the
  longest bucket with empty rows.
  """
  every = np.asarray(order, np.int32)
  lengths = sizes.lengths[every]
  waiting, shorter = every[:0], -1
  for length in shape.bucket_lengths:
    members = np.concatenate([waiting, every[(shorter < lengths) & (lengths <= length)]])
    whole = len(members) // shape.batch * shape.batch
    yield from (PackedRow(length, (int(i),)) for i in members[:whole])
    waiting, shorter = members[whole:], length
  if len(waiting):
    yield from (PackedRow(shape.length, (int(i),)) for i in waiting)
    yield from [PackedRow(shape.length)] * (shape.batch - len(waiting))


def balanced(order: Order, sizes: Sizes, shape: Shape) -> Iterator[PackedRow]:
  """Packs `shape.samples` samples into each batch, so that an epoch has as many steps as unpacked.

  Deals about WINDOW (8192) samples of the shuffled `order` at a time to batches, the largest first
  and back and forth, so that all batches need about the same number of rows; packs each by
  `first_fit`, and adds empty rows. What does not fit into the rows of a batch comes with the next
  window. The last batch holds the samples that are left.
  """
  lengths, tiles = sizes.lengths, sizes.tiles
  deferred: list[int] = []
  start, window = 0, max(1, WINDOW // shape.samples) * shape.samples
  while deferred or start < len(order):
    fresh = np.asarray(order[start : start + window - len(deferred)]).tolist()
    start += len(fresh)
    taken, deferred = [*deferred, *fresh], []
    whole = len(taken) // shape.samples
    dealt, rest = taken[: whole * shape.samples], taken[whole * shape.samples :]
    size = {i: (-int(tiles[i]), -int(lengths[i])) for i in taken}
    largest = sorted(dealt, key=size.__getitem__)
    for samples in _dealt(largest, whole) or [rest]:
      packed = list(first_fit(samples, sizes, shape))
      if len(packed) > shape.batch:  # the emptiest rows wait
        packed.sort(key=lambda row: sum(size[i][1] for i in row.samples))
        deferred += [i for row in packed[shape.batch :] for i in row.samples]
      yield from (packed + [PackedRow(shape.length)] * shape.batch)[: shape.batch]
    deferred += rest if whole else []


def _dealt(samples: Sequence[int], hands: int) -> list[list[int]]:
  """Deals samples one by one to so many lists, back and forth."""
  rounds = [samples[i : i + hands] for i in range(0, len(samples), hands or 1)]
  turned = [round_[::-1] if number % 2 else round_ for number, round_ in enumerate(rounds)]
  return [list(hand) for hand in zip(*turned, strict=True)]


@dataclasses.dataclass(frozen=True)
class Packing:
  """Defines how samples are grouped into rows."""

  group: Callable[[Order, Sizes, Shape], Rows | Iterator[PackedRow]]
  measured: bool = True  # whether `group` needs the sizes of the samples
  batched: bool = False  # whether whole batches are shuffled, in place of rows
  counted: bool = False  # whether a batch has a number of samples, `data.samples_per_batch`
  shared: bool = True  # whether samples share rows


PACKINGS = {
  "none": Packing(one_each, measured=False, shared=False),
  "first_fit": Packing(first_fit),
  "balanced": Packing(balanced, batched=True, counted=True),
  "buckets": Packing(buckets, batched=True, shared=False),
}


def most_samples(data: DataConfig) -> int:
  """Returns the most samples that a row of training holds; 0 for any number."""
  return data.samples_per_row if PACKINGS[data.packing].shared else 1


def plan(packing: Packing, sizes: Sizes, shape: Shape, seed: int, epoch: int) -> Rows:
  """Returns the rows of one epoch; every usable sample is in exactly one of them.

  `seed` and `epoch` decide how samples and rows are shuffled.
  """
  rng = np.random.default_rng([seed, epoch])
  found = packing.group(rng.permutation(sizes.usable), sizes, shape)
  rows = found if isinstance(found, Rows) else Rows.of(found)
  return rows.shuffled(rng, shape.batch if packing.batched else 1)


def fill(rows: Rows, sizes: Sizes) -> float:
  """Returns the share, from 0 to 1, of the positions of all rows that hold a token."""
  return int(sizes.lengths[rows.samples].sum()) / int(rows.lengths.sum())


class Stream:
  """Provides the endless sequence of rows of all epochs, by index; may be shared by threads."""

  def __init__(self, packing: Packing, shape: Shape, seed: int, sizes: Callable[[int], Sizes]):
    """Stores the arguments.

    `sizes(epoch)` returns the sizes of the samples; it is called only when the rows of an epoch are
    planned.
    """
    self._packing, self._shape, self._seed, self._sizes = packing, shape, seed, sizes
    self._ends: list[int] = []  # rows up to the end of each planned epoch
    self._rows: dict[int, Rows] = {}
    self._lock = threading.Lock()

  def epoch(self, number: int) -> Rows:
    """Returns the rows of epoch `number`, from 0. Raises: ValueError when it has none."""
    with self._lock:
      return self._planned(number)

  def epoch_rows(self) -> int:
    """Returns the number of rows of the first epoch."""
    return len(self.epoch(0))

  def __getitem__(self, row: int) -> tuple[int, PackedRow]:
    """Returns (epoch, row) of the row that is number `row`, from 0, since the start of training."""
    with self._lock:
      while not self._ends or self._ends[-1] <= row:
        self._planned(len(self._ends))
      number = bisect.bisect_right(self._ends, row)
      rows = self._planned(number)
      return number, rows[row - self._ends[number] + len(rows)]

  def _planned(self, number: int) -> Rows:
    if number not in self._rows:
      rows = plan(self._packing, self._sizes(number), self._shape, self._seed, number)
      if not rows:
        raise ValueError(f"epoch {number} has no rows: no sample can be used")
      self._rows[number] = rows
      if number == len(self._ends):
        self._ends.append(len(rows) + (self._ends[-1] if self._ends else 0))
      for old in [n for n in self._rows if n <= number - KEPT]:
        del self._rows[old]
    return self._rows[number]
