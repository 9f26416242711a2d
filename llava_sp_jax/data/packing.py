"""Which samples share a row: a pure function of their sizes and the seed, the same on every host.

An epoch is planned ahead, as a whole: its samples are shuffled and grouped, and its rows are
shuffled again, so that neither long samples nor well filled rows come first. Row r of the endless
stream of rows is then known without reading anything before it: a position in the data is a number
of rows, whatever the number of hosts.
"""

from __future__ import annotations

import bisect
import dataclasses
import threading
from collections.abc import Callable, Sequence

import numpy as np

WINDOW = 8192  # samples that are grouped at a time; more fill rows no better (see the benchmark)
KEPT = 2  # epochs whose rows stay in memory: readers ahead are in the next one


@dataclasses.dataclass(frozen=True, eq=False)
class Sizes:
  """What each sample takes of a row; `usable` are the indices of those that are not left out."""

  lengths: np.ndarray  # [N] int32, tokens in a row, image tokens included
  tiles: np.ndarray  # [N] int32
  usable: np.ndarray  # [U] int32, ascending


@dataclasses.dataclass(frozen=True)
class Shape:
  """What rows are made for: `length` tokens, `tiles` tiles, batches of `batch` rows."""

  length: int
  tiles: int
  batch: int
  buckets: tuple[int, ...] = ()  # static lengths, ascending; empty: quarters of `length`

  @property
  def bucket_lengths(self) -> tuple[int, ...]:
    quarters = [max(1, self.length * i // 4) for i in (1, 2, 3)]
    return tuple(sorted({*(self.buckets or quarters), self.length}))


@dataclasses.dataclass(frozen=True)
class PackedRow:
  """The samples of a row, in their order, and its static length."""

  length: int
  samples: tuple[int, ...] = ()


def one_each(order: Sequence[int], sizes: Sizes, shape: Shape) -> list[PackedRow]:
  """Every sample has a row to itself; sizes need not be known."""
  return [PackedRow(shape.length, (i,)) for i in order]


def first_fit(order: Sequence[int], sizes: Sizes, shape: Shape) -> list[PackedRow]:
  """Largest sample first, each into the fullest row that still has room for its tokens and tiles.

  It looks at WINDOW samples of the shuffled order at a time, which bounds how far samples of like
  size can be drawn together.
  """
  lengths, tiles = sizes.lengths.tolist(), sizes.tiles.tolist()
  rows: list[PackedRow] = []
  for start in range(0, len(order), WINDOW):
    window = sorted(order[start : start + WINDOW], key=lambda i: -lengths[i])  # stable
    held: list[list[int]] = []
    # By the tiles that a row has room for: (tokens it has room for, its number), ascending.
    room: list[list[tuple[int, int]]] = [[] for _ in range(shape.tiles + 1)]
    for i in window:
      length, count = lengths[i], tiles[i]
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
      if free > length:
        bisect.insort(room[left - count], (free - length, row))
    rows += [PackedRow(shape.length, tuple(samples)) for samples in held]
  return rows


def buckets(order: Sequence[int], sizes: Sizes, shape: Shape) -> list[PackedRow]:
  """One sample to a row, padded to the shortest bucket that holds it; every batch is of one bucket.

  What does not fill a batch goes up a bucket; the last batch of all has empty rows.
  """
  batches: list[list[PackedRow]] = []
  waiting: list[int] = []
  shorter = -1
  for length in shape.bucket_lengths:
    mine = waiting + [i for i in order if shorter < sizes.lengths[i] <= length]
    whole = len(mine) // shape.batch * shape.batch
    rows = [PackedRow(length, (i,)) for i in mine[:whole]]
    batches += [rows[i : i + shape.batch] for i in range(0, whole, shape.batch)]
    waiting, shorter = mine[whole:], length
  if waiting:
    empty = [PackedRow(shape.length)] * (shape.batch - len(waiting))
    batches.append([PackedRow(shape.length, (i,)) for i in waiting] + empty)
  return [row for batch in batches for row in batch]


@dataclasses.dataclass(frozen=True)
class Packing:
  """How to group samples; `measured`: it needs their sizes."""

  group: Callable[[Sequence[int], Sizes, Shape], list[PackedRow]]
  measured: bool = True
  batched: bool = False  # rows of a batch stay together


PACKINGS = {
  "none": Packing(one_each, measured=False),
  "first_fit": Packing(first_fit),
  "buckets": Packing(buckets, batched=True),
}


def plan(packing: Packing, sizes: Sizes, shape: Shape, seed: int, epoch: int) -> list[PackedRow]:
  """The rows of one epoch; every usable sample is in one of them, once."""
  rng = np.random.default_rng([seed, epoch])
  rows = packing.group(rng.permutation(sizes.usable).tolist(), sizes, shape)
  size = shape.batch if packing.batched else 1
  order = rng.permutation(len(rows) // size).tolist()
  return [row for i in order for row in rows[i * size : (i + 1) * size]]


def fill(rows: Sequence[PackedRow], sizes: Sizes) -> float:
  """The share of the rows' places that hold a token."""
  used = sum(int(sizes.lengths[i]) for row in rows for i in row.samples)
  return used / sum(row.length for row in rows)


class Stream:
  """Row r of all epochs, one after the other. Threads may share it."""

  def __init__(self, packing: Packing, shape: Shape, seed: int, sizes: Callable[[int], Sizes]):
    """`sizes` of an epoch are asked for when its rows are planned."""
    self._packing, self._shape, self._seed, self._sizes = packing, shape, seed, sizes
    self._ends: list[int] = []  # of the epochs that were planned, in rows
    self._rows: dict[int, list[PackedRow]] = {}
    self._lock = threading.Lock()

  def epoch(self, number: int) -> list[PackedRow]:
    """The rows of an epoch. Raises: ValueError when it has none."""
    with self._lock:
      return self._planned(number)

  def __getitem__(self, row: int) -> tuple[int, PackedRow]:
    """The epoch of row `row`, counted from the start of training, and the row itself."""
    with self._lock:
      while not self._ends or self._ends[-1] <= row:
        self._planned(len(self._ends))
      number = bisect.bisect_right(self._ends, row)
      rows = self._planned(number)
      return number, rows[row - self._ends[number] + len(rows)]

  def _planned(self, number: int) -> list[PackedRow]:
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
