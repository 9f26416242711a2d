"""The order in which requests are answered: those about the same images together, read ahead.

Requests are taken lazily, some way ahead of those that are answered, and within that window they
are grouped by their images; the group that was first asked for is answered first. Worker threads
make prompts of the next ones, which decodes and resizes their images, while the device computes.
"""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from llava_sp_jax.data.failure import SampleError, attempt
from llava_sp_jax.infer.prompts import Prompt, Prompts, Request, keys_of


class Ready(NamedTuple):
  number: int  # the place among the requests, from 0
  request: Request
  prompt: Prompt | None
  error: str  # why there is no prompt

  @property
  def drawn_by(self) -> int:
    """The number that samples are drawn by."""
    return self.number if self.request.number is None else self.request.number


class _Waiting(NamedTuple):
  number: int
  request: Request


class Schedule:
  """Requests in, `Ready` prompts out.

  `window` requests at most are held; of these, `ahead` are being read or have been.
  """

  def __init__(
    self, requests: Iterable[Request], prompts: Prompts, threads: int, window: int, ahead: int
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
    self._threads.shutdown(wait=True, cancel_futures=True)

  def peek(self) -> Ready | None:
    """The next one, waited for if it is still being read; None when all are taken."""
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
    front, self._front = self.peek(), None
    return front

  @property
  def more(self) -> bool:
    return self._front is not None or bool(self._reading) or self._fill()

  def _fill(self) -> bool:
    """Takes requests until the window is full and starts reading the next. Are there any?"""
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
  return ("unknown",) if isinstance(keys, SampleError) else keys  # making its prompt says why
