"""Orders requests: reads their images ahead, and answers those about the same images together.

Requests are taken lazily, up to a window ahead of the answers. Within the window they are grouped
by their images, and the group whose first request came first is answered first. While the device
computes, worker threads make the prompts of the next requests, which includes decoding and resizing
images.
"""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple, Protocol

from llava_sp_jax.data.failure import SampleError, attempt
from llava_sp_jax.infer.requests import Prompt, Request, keys_of


class Ready(NamedTuple):
  """Holds a request with its prompt, or with the error that prevented one."""

  number: int  # place among the requests, from 0
  request: Request
  prompt: Prompt | None
  error: str  # reason for the missing prompt

  @property
  def drawn_by(self) -> int:
    """Returns the number that seeds the sampling: the request's own, or else its place."""
    return self.number if self.request.number is None else self.request.number


class Source(Protocol):
  """Declares where the engine takes requests from, with their prompts."""

  @property
  def more(self) -> bool:
    """Returns whether there are requests that were not taken."""
    ...

  def peek(self) -> Ready | None:
    """Returns the next request, None if there is none now."""
    ...

  def take(self) -> Ready | None:
    """Removes the next request and returns it."""
    ...

  def wait(self) -> bool:
    """Waits for a request, and returns whether there may be one; False when all are answered."""
    ...

  def cancelled(self) -> Collection[int]:
    """Returns the numbers of requests whose answers are no longer wanted."""
    ...


class _Waiting(NamedTuple):
  number: int
  request: Request


class Schedule:
  """Takes requests from an iterator, and returns them with their prompts, as `Ready`.

  It holds at most `window` requests that have not begun, so requests with the same images can be
  answered together. At most `ahead` prompts are being made or waiting, by `threads` threads.
  """

  def __init__(
    self,
    requests: Iterable[Request],
    prompts: Callable[[Request], Prompt],
    threads: int,
    window: int,
    ahead: int,
  ):
    self._requests: Iterator[tuple[int, Request]] = iter(enumerate(requests))
    self._prompts, self._window, self._ahead = prompts, window, ahead
    self._groups: collections.OrderedDict[tuple[str, ...], collections.deque[_Waiting]]
    self._groups = collections.OrderedDict()
    self._held, self._all_taken = 0, False
    self._reading: collections.deque[tuple[_Waiting, concurrent.futures.Future[Prompt]]]
    self._reading = collections.deque()
    self._threads = concurrent.futures.ThreadPoolExecutor(threads, "llava-sp-read")
    self._front: Ready | None = None

  def close(self) -> None:
    """Stops the worker threads; prompts that were not begun are dropped."""
    self._threads.shutdown(wait=True, cancel_futures=True)

  def peek(self) -> Ready | None:
    """Returns the next request with its prompt, which it waits for; None after the last."""
    if self._front is None:
      self._fill()
      if not self._reading:
        return None
      waiting, future = self._reading.popleft()
      self._fill()
      try:
        self._front = Ready(*waiting, future.result(), "")
      except SampleError as error:
        self._front = Ready(*waiting, None, str(error))
    return self._front

  def take(self) -> Ready | None:
    """Removes the next request and returns it with its prompt; None after the last one."""
    front, self._front = self.peek(), None
    return front

  @property
  def more(self) -> bool:
    """Returns whether there are requests that were not taken."""
    return self._front is not None or bool(self._reading) or self._fill()

  def wait(self) -> bool:
    """Returns `more`, because `peek` waits by itself."""
    return self.more

  def cancelled(self) -> Collection[int]:
    """Returns nothing: whoever iterates over answers takes all of them."""
    return ()

  def _fill(self) -> bool:
    """Takes requests until the window is full, and starts to make the next prompts.

    Returns whether there are any.
    """
    while not self._all_taken and self._held < self._window:
      found = next(self._requests, None)
      if found is None:
        self._all_taken = True
        break
      self._held += 1
      group = _group(found[1])
      self._groups.setdefault(group, collections.deque()).append(_Waiting(*found))
    while self._groups and len(self._reading) < self._ahead:
      group, members = next(iter(self._groups.items()))
      waiting = members.popleft()
      if not members:
        del self._groups[group]
      self._held -= 1
      self._reading.append((waiting, self._threads.submit(self._prompts, waiting.request)))
    return bool(self._reading)


def _group(request: Request) -> tuple[str, ...]:
  keys = attempt(lambda: keys_of(request))
  # An error is reported later, when the prompt is made.
  return ("unknown",) if isinstance(keys, SampleError) else keys
