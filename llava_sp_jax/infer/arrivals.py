"""Queues requests that arrive at any time, and makes their prompts in worker threads."""

from __future__ import annotations

import collections
import concurrent.futures
import threading
from collections.abc import Callable, Collection
from typing import NamedTuple

from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.errors import LlavaSPError
from llava_sp_jax.infer.requests import Prompt, Request
from llava_sp_jax.infer.schedule import Ready


class QueueFullError(LlavaSPError, RuntimeError):
  """Raised for a request that the queue has no room for; the message says how many wait."""


class ClosedError(LlavaSPError, RuntimeError):
  """Raised for a request after the queue was closed."""


class _Arrival(NamedTuple):
  request: Request
  prompt: concurrent.futures.Future[Prompt]


class Arrivals:
  """Implements `schedule.Source` for requests that arrive at any time; any thread may add one.

  Requests are taken in the order of their arrival, but one whose images are still being read lets
  others pass. At most `waiting` requests wait, whose prompts have at most `tokens` positions.
  """

  def __init__(self, prompts: Callable[[Request], Prompt], threads: int, waiting: int, tokens: int):
    """Makes an empty queue; `prompts` makes the prompt of a request, in one of `threads`."""
    self._prompts, self._most, self._most_tokens = prompts, waiting, tokens
    self._threads = concurrent.futures.ThreadPoolExecutor(threads, "llava-sp-read")
    self._changed = threading.Condition()
    self._waiting: collections.OrderedDict[int, _Arrival] = collections.OrderedDict()
    self._unwanted: set[int] = set()
    self._front: Ready | None = None
    self._count, self._open = 0, True

  def __len__(self) -> int:
    return len(self._waiting) + (self._front is not None)

  def add(self, request: Request) -> int:
    """Adds a request and returns its number.

    Raises: QueueFullError, ClosedError.
    """
    with self._changed:
      if not self._open:
        raise ClosedError("no request is taken any more")
      if len(self) >= self._most:
        raise QueueFullError(f"{len(self)} requests wait; at most {self._most} may")
      tokens = sum(arrival.prompt.result().length for _, arrival in self._read())
      if tokens >= self._most_tokens:
        raise QueueFullError(
          f"requests of {tokens:,} tokens wait; others must wait at {self._most_tokens:,}"
        )
      self._count += 1
      prompt = self._threads.submit(self._prompts, request)
      self._waiting[self._count] = _Arrival(request, prompt)
    prompt.add_done_callback(self._notify)
    return self._count

  def cancel(self, number: int) -> None:
    """Drops a request that waits; the engine is told of one that is being answered."""
    with self._changed:
      if (arrival := self._waiting.pop(number, None)) is not None:
        arrival.prompt.cancel()
      else:
        self._unwanted.add(number)
        if self._front is not None and self._front.number == number:
          self._front = None
      self._changed.notify_all()

  def close(self) -> None:
    """Takes no more requests; those that wait are still answered."""
    with self._changed:
      self._open = False
      self._changed.notify_all()

  def stop(self) -> list[int]:
    """Closes the queue, drops all that wait, and returns their numbers."""
    with self._changed:
      self._open = False
      dropped = list(self._waiting)
      self._waiting.clear()
      self._front = None
      self._changed.notify_all()
    self._threads.shutdown(wait=False, cancel_futures=True)
    return dropped

  # ---- what the engine uses ----

  @property
  def more(self) -> bool:
    """Returns whether requests wait or may come."""
    return self._open or bool(self._waiting) or self._front is not None

  def peek(self) -> Ready | None:
    """Returns the first request whose prompt is made; None if there is none now."""
    with self._changed:
      if self._front is None and (number := self._made()) is not None:
        self._front = _ready(number, self._waiting.pop(number))
      return self._front

  def take(self) -> Ready | None:
    """Removes the request that `peek` returns, and returns it."""
    with self._changed:
      ready, self._front = self.peek(), None
    return ready

  def wait(self) -> bool:
    """Blocks until the prompt of a request is made; returns False once closed and empty."""
    with self._changed:
      self._changed.wait_for(
        lambda: not self.more or self._front is not None or self._made() is not None
      )
      return self.more

  def _made(self) -> int | None:
    return next((number for number, one in self._waiting.items() if one.prompt.done()), None)

  def cancelled(self) -> Collection[int]:
    """Returns the numbers of requests that were cancelled after they were taken, once."""
    with self._changed:
      unwanted, self._unwanted = self._unwanted, set()
    return unwanted

  def _read(self) -> list[tuple[int, _Arrival]]:
    """Returns the waiting requests whose prompts could be made."""
    return [
      (number, arrival)
      for number, arrival in self._waiting.items()
      if arrival.prompt.done() and not arrival.prompt.exception()
    ]

  def _notify(self, _: object) -> None:
    with self._changed:
      self._changed.notify_all()


def _ready(number: int, arrival: _Arrival) -> Ready:
  try:
    return Ready(number, arrival.request, arrival.prompt.result(), "")
  except SampleError as error:
    return Ready(number, arrival.request, None, str(error))
  except Exception as error:  # a fault of ours costs one request
    return Ready(number, arrival.request, None, f"{type(error).__name__}: {error}")
