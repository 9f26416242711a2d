"""Prefetches in threads that never keep a process from exiting."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

POLL_SECONDS = 0.2  # between two polls of `stopped`


class Stopped(Exception):  # noqa: N818 - reports a stop, not an error
  """Reports that the reader was asked to stop while it waited."""


class Prefetcher:
  """Computes `make(start)`, `make(start + 1)`, ... in threads, at most `room` ahead of the reader.

  The threads are daemons: one that hangs in a file system does not keep the process from exiting.
  They stop at `close`, or when the Prefetcher is garbage-collected.
  """

  def __init__(self, make: Callable[[int], Any], start: int, threads: int, room: int):
    self._work = _Work(make, start, room)
    self.close = weakref.finalize(self, self._work.close)
    for number in range(max(1, threads)):
      name = f"llava-sp-prefetch-{number}"
      threading.Thread(target=self._work.run, name=name, daemon=True).start()

  def take(self, stopped: Callable[[], bool]) -> Any:
    """Returns the next result, in order, after waiting for it.

    Raises: what `make` raised; Stopped when `stopped()` is true before the result is ready.
    """
    return self._work.take(stopped)


class _Work:
  """Holds what the threads share.

  The threads refer to it and not to the Prefetcher, so that the latter can be garbage-collected.
  """

  def __init__(self, make: Callable[[int], Any], start: int, room: int):
    self._make, self._room = make, room
    self._made: dict[int, tuple[Any, BaseException | None]] = {}
    self._begun = self._taken = start
    self._closed = False
    self._changed = threading.Condition()

  def run(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._closed or self._begun - self._taken < self._room)
        if self._closed:
          return
        number, self._begun = self._begun, self._begun + 1
      made: tuple[Any, BaseException | None]
      try:
        made = (self._make(number), None)
      except BaseException as error:  # `take` raises it
        made = (None, error)
      with self._changed:
        self._made[number] = made
        self._changed.notify_all()

  def take(self, stopped: Callable[[], bool]) -> Any:
    with self._changed:
      while self._taken not in self._made:
        if stopped():
          raise Stopped
        self._changed.wait(POLL_SECONDS)
      found, error = self._made.pop(self._taken)
      self._taken += 1
      self._changed.notify_all()
    if error is not None:
      raise error
    return found

  def close(self) -> None:
    with self._changed:
      self._closed = True
      self._made.clear()
      self._changed.notify_all()
