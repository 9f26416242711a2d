"""Prefetches in threads that never keep a process from exiting."""

from __future__ import annotations

import atexit
import collections
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
  """Says how what is far away is read, in so many threads, which mostly wait.

  `begin(number)` begins to read and returns what waits for the result.
  """

  begin: Callable[[int], Callable[[], Any]]
  threads: int


class Prefetcher:
  """Computes `make(start)`, `make(start + 1)`, ... in threads, at most `room` ahead of the reader.

  With `ahead`, its threads load further ahead, and `threads` others compute
  `make(number, loaded)`. Each begins several at a time, if there is room enough for all of them.

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
    self._work = work = _Work(make, start, room, ahead)
    _works.add(work)
    self.close = weakref.finalize(self, work.close)
    makers = [work.make] * max(1, threads)
    for number, run in enumerate([*makers, *[work.load] * (ahead.threads if ahead else 0)]):
      name = f"llava-sp-prefetch-{number}"
      threading.Thread(target=run, name=name, daemon=True).start()

  def take(self, stopped: Callable[[], bool]) -> Any:
    """Returns the next result, in order, after waiting for it.

    Raises: what `make` raised; Stopped when `stopped()` is true before the result is ready.
    """
    return self._work.take(stopped)


class _Work:
  """Holds what the threads share. Each wakes only those that can go on then: they may be many.

  The threads refer to it and not to the Prefetcher, so that the latter can be garbage-collected.
  """

  def __init__(self, make: Callable[..., Any], start: int, room: int, ahead: Ahead | None):
    self._make, self._room, self._ahead = make, room, ahead
    self._reach = max(room, ahead.threads) if ahead else room  # begun, and not taken yet
    self._together = self._reach // ahead.threads if ahead else 1  # begun by a thread at a time
    self._loaded: dict[int, Any] = {}  # what `make` has not begun with yet
    self._made: dict[int, tuple[Any, BaseException | None]] = {}
    self._begun = self._taken = start
    self._closed = False
    self._busy = 0  # threads that call `load` or `make`
    lock = threading.RLock()
    self._may_begin, self._may_make, self._changed = (threading.Condition(lock) for _ in range(3))

  def load(self) -> None:
    """Loads until the end, in a thread of its own."""
    assert self._ahead
    while chosen := self._next(self._may_begin, self._to_begin):
      self._load(chosen, self._ahead.begin)
      with self._changed:
        self._busy -= 1
        if self._closed:
          self._changed.notify_all()  # for `leave`

  def _load(self, numbers: tuple[int, ...], begin: Callable[[int], Callable[[], Any]]) -> None:
    """Begins all of them, and then waits for each; nothing is held when it returns."""
    begun = collections.deque[tuple[int, Any, BaseException | None]]()
    for number in numbers:
      if self._closed:
        return
      begun.append((number, *_tried(begin, number)))
    while begun and not self._closed:
      number, wait, error = begun.popleft()
      loaded, error = _tried(wait) if error is None else (None, error)
      with self._changed:
        if error is None:
          self._loaded[number] = loaded
          self._may_make.notify()
        else:
          self._made[number] = None, error
          self._changed.notify_all()

  def make(self) -> None:
    """Makes results until the end, in a thread of its own."""
    choose = self._to_make if self._ahead else self._to_begin
    while chosen := self._next(self._may_make, choose):
      made = _tried(self._make, *chosen)
      with self._changed:
        self._made[chosen[0]] = made
        self._busy -= 1
        self._changed.notify_all()

  def _next(
    self, changed: threading.Condition, choose: Callable[[], tuple[Any, ...]]
  ) -> tuple[Any, ...]:
    """Waits until there is work, and returns its number and what was loaded; () at the end."""
    with changed:
      while not self._closed:
        if chosen := choose():
          self._busy += 1
          return chosen
        changed.wait()
    return ()

  def _to_begin(self) -> tuple[Any, ...]:
    if self._free() < self._together:
      return ()
    first = self._begun
    self._begun += self._together
    return tuple(range(first, self._begun))

  def _free(self) -> int:
    return self._reach - (self._begun - self._taken)

  def _to_make(self) -> tuple[Any, ...]:
    number = min(self._loaded, default=None)
    if number is None or number - self._taken >= self._room:
      return ()
    return number, self._loaded.pop(number, None)  # `close` may run within this thread

  def take(self, stopped: Callable[[], bool]) -> Any:
    with self._changed:
      while self._taken not in self._made:
        if stopped():
          raise Stopped
        self._changed.wait(POLL_SECONDS)
      found, error = self._made.pop(self._taken)
      self._taken += 1
      if not self._free() % self._together:  # one thread for each time that there is room
        self._may_begin.notify()
      self._may_make.notify()
    if error is not None:
      raise error
    return found

  def close(self) -> None:
    with self._changed:
      self._closed = True
      self._made.clear()
      self._loaded.clear()
      for waiting in (self._may_begin, self._may_make, self._changed):
        waiting.notify_all()

  def leave(self, until: float) -> None:
    """Waits until no thread is at work, or `time.monotonic()` is `until`."""
    with self._changed:
      self._changed.wait_for(lambda: not self._busy, max(0.0, until - time.monotonic()))


def _tried(call: Callable[..., Any], *given: Any) -> tuple[Any, BaseException | None]:
  """Calls, and returns the result and None, or None and the error, which `take` raises."""
  try:
    return call(*given), None
  except BaseException as error:
    return None, error


_works: weakref.WeakSet[_Work] = weakref.WeakSet()  # of all threads that may still run


@atexit.register
def _leave() -> None:
  """Stops all threads, and waits for those that are at work."""
  works, until = list(_works), time.monotonic() + EXIT_SECONDS
  for work in works:
    work.close()
  for work in works:
    work.leave(until)
