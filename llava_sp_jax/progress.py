"""Prints the progress of long work: a line every few seconds with the rate and the time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO

EVERY = 5.0  # seconds between two lines


def eta(seconds: float) -> str:
  """Formats a time left in seconds as `eta h:mm:ss`."""
  left = max(0, int(seconds))
  return f"eta {left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d}"


class Progress:
  """Counts the finished units of `total`, and prints a line at most every `every` seconds.

  `scale` divides the counts that are printed (1e9 prints bytes as GB). With `shown` false, nothing
  is printed. Lines go to `stream`, by default standard output.
  """

  def __init__(
    self,
    total: float,
    unit: str,
    *,
    scale: float = 1.0,
    every: float = EVERY,
    shown: bool = True,
    stream: TextIO | None = None,
  ):
    self.total, self.done, self._unit, self._scale = total, 0.0, unit, scale
    self._every, self._shown, self._stream = every, shown, stream
    self._started = self._said = time.monotonic()

  @property
  def seconds(self) -> float:
    """Returns the seconds since this object was made, by which rates are computed."""
    return time.monotonic() - self._started

  def add(self, count: float = 1, note: str = "", last: bool = False) -> None:
    """Adds `count` finished units; `note` ends the line, which is always printed if `last`."""
    self.at(self.done + count, note, last)

  def at(self, done: float, note: str = "", last: bool = False) -> None:
    """Sets the number of finished units to `done`.

    `note` ends the line, which is always printed if `last`.
    """
    self.done = done
    now = time.monotonic()
    if self._shown and (last or now - self._said >= self._every):
      self._said = now
      print(self.line(note), file=self._stream or sys.stdout, flush=True)

  def line(self, note: str = "") -> str:
    """Returns the progress as a line: units done, rate, time left, and `note`."""
    rate = self.done / max(self.seconds, 1e-9)
    digits = 0 if self._scale == 1 else 2
    done, total = (f"{count / self._scale:,.{digits}f}" for count in (self.done, self.total))
    speed = rate / self._scale
    parts = [
      f"{done:>{len(total)}} of {total} {self._unit}",
      f"{speed:,.{0 if speed >= 100 else 2}f} {self._unit}/s",
      eta((self.total - self.done) / rate if rate else 0),
    ]
    return "  ".join(parts + [note] * bool(note))
