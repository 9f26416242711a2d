"""Decides which source each row of a mixture is of, exactly, as a pure function of its number.

It is the chairman assignment of Tijdeman (1980): behind any number of rows, each source has had its
share of them, to less than one row. Nothing is drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BLOCK = 1 << 12  # rows that are assigned at a time
KEPT = 8  # blocks in memory: threads read rows out of order


class Schedule:
  """Assigns rows to sources in proportion to whole numbers, `units`; repeats after their sum."""

  def __init__(self, units: Sequence[int]):
    """Stores the numbers, all of which are at least 1."""
    divisor = math.gcd(*units)
    self._units = [unit // divisor for unit in units]
    self._period = sum(self._units)
    self._starts = [[0] * len(units)]  # rows of each source before each block
    self._blocks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

  def __getitem__(self, place: int) -> tuple[int, int]:
    """Returns the source of row `place`, and how many rows of that source come before it."""
    turn, at = divmod(place, self._period)
    number, at = divmod(at, BLOCK)
    sources, ranks = self._block(number)
    source = int(sources[at])
    return source, turn * self._units[source] + int(ranks[at])

  def counts(self, place: int) -> list[int]:
    """Returns how many of the first `place` rows each source has."""
    turn, at = divmod(place, self._period)
    number, at = divmod(at, BLOCK)
    sources, _ = self._block(number)
    here = np.bincount(sources[:at], minlength=len(self._units)).tolist()
    before = zip(self._units, self._starts[number], here, strict=True)
    return [turn * unit + start + rows for unit, start, rows in before]

  def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the source [BLOCK] of each row of a block, and the rows of that source before it."""
    if number not in self._blocks:
      while len(self._starts) <= number + 1:
        self._assign(len(self._starts) - 1)
      if number not in self._blocks:  # one of before, which is read again
        self._assign(number)
    return self._blocks[number]

  def _assign(self, number: int) -> None:
    units, whole = self._units, self._period
    counts, kinds = list(self._starts[number]), range(len(units))
    slack = max(1, 2 * len(units) - 2)
    sources, ranks = np.zeros(BLOCK, np.uint16), np.zeros(BLOCK, np.int64)
    # The row by which a source must have its next one, and the row before which it may not have it.
    due = [(slack * count + slack - 1) / unit for count, unit in zip(counts, units, strict=True)]
    free = [whole * (slack * counts[i] + 1) for i in kinds]
    for at in range(min(BLOCK, whole - number * BLOCK)):
      row = slack * (number * BLOCK + at + 1)
      i = min((i for i in kinds if units[i] * row >= free[i]), key=due.__getitem__)
      sources[at], ranks[at] = i, counts[i]
      counts[i] += 1
      due[i] = (slack * counts[i] + slack - 1) / units[i]
      free[i] += whole * slack
    if len(self._starts) == number + 1:
      self._starts.append(counts)
    self._blocks[number] = sources, ranks
    for old in list(self._blocks)[:-KEPT]:
      del self._blocks[old]
