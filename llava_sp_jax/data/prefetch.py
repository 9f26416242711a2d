"""Prefetches in threads that never keep a process from exiting."""

from __future__ import annotations

import atexit
import dataclasses
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

POLL_SECONDS = 0.2  # between two polls of `stopped`
EXIT_SECONDS = 2.0  # that the exit of the process waits for threads that are at work


class Stopped(Exception):  # noqa: N818 - reports a stop, not an error
  """Reports that the reader was asked to stop while it waited."""


@dataclasses.dataclass(frozen=True)
class Ahead:
  """Says how what is far away is read: `load(number)` in so many threads, which mostly wait."""

  load: Callable[[int], Any]
  threads: int


class Prefetcher:
  """Computes `make(start)`, `make(start + 1)`, ... in threads, at most `room` ahead of the reader.

  With `ahead`, its threads load further ahead, and of them `threads` at a time compute
  `make(number, load(number))`.

  The threads are daemons: one that hangs in a file system does not keep the process from exiting.
  They stop at `close`, or when the Prefetcher is garbage-collected. The exit waits for others for at
  most EXIT_SECONDS, because libraries in C++ abort a process that ends while they are called.
  """

  def __init__(
    self,
    make: Callable[..., Any],
    start: int,
    threads: int,
    room: int,
    ahead: Ahead | None = None,
  ):
    self._work = _Work(make, start, threads, room, ahead)
    _works.add(self._work)
    self.close = weakref.finalize(self, self._work.close)
    for number in range(ahead.threads if ahead else max(1, threads)):
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

  def __init__(
    self, make: Callable[..., Any], start: int, threads: int, room: int, ahead: Ahead | None
  ):
    self._make, self._room, self._ahead = make, room, ahead
    self._reach = max(room, ahead.threads) if ahead else room  # begun, and not taken yet
    self._makers = threading.Semaphore(max(1, threads))
    self._made: dict[int, tuple[Any, BaseException | None]] = {}
    self._begun = self._taken = start
    self._closed = False
    self._busy = 0  # threads that call `make`
    self._changed = threading.Condition()

  def run(self) -> None:
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._closed or self._begun - self._taken < self._reach)
        if self._closed:
          return
        number, self._begun = self._begun, self._begun + 1
        self._busy += 1
      made: tuple[Any, BaseException | None]
      try:
        made = (self._made_from(number), None)
      except BaseException as error:  # `take` raises it
        made = (None, error)
      with self._changed:
        self._made[number] = made
        self._busy -= 1
        self._changed.notify_all()

  def _made_from(self, number: int) -> Any:
    if not self._ahead:
      return self._make(number)
    loaded = self._ahead.load(number)
    with self._changed:
      self._changed.wait_for(lambda: self._closed or number - self._taken < self._room)
      if self._closed:
        return None
    with self._makers:
      return self._make(number, loaded)

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

  def leave(self, until: float) -> None:
    """Waits until no thread is at work, or `time.monotonic()` is `until`."""
    with self._changed:
      self._changed.wait_for(lambda: not self._busy, max(0.0, until - time.monotonic()))


_works: weakref.WeakSet[_Work] = weakref.WeakSet()  # of all threads that may still run


@atexit.register
def _leave() -> None:
  """Stops all threads, and waits for those that are at work."""
  works, until = list(_works), time.monotonic() + EXIT_SECONDS
  for work in works:
    work.close()
  for work in works:
    work.leave(until)
