"""Asks the engine for the answers to one request of a client, and waits for them.

The engine reports in a thread of its own. Each report has all of the text so far, so only the
latest one is kept: a client that reads slowly costs no memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Self

from llava_sp_jax.infer.arrivals import ClosedError, QueueFullError
from llava_sp_jax.infer.requests import Answer, Request
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.metrics import Metrics
from llava_sp_jax.serve.served import Served, Ticket, Update

# Exceptions of `Service.submit` -> the codes of their errors.
REFUSALS: dict[type[Exception], str] = {
  QueueFullError: "too_many_requests",
  ClosedError: "not_ready",
}
FAILED = "the server failed; its log says why"


class _One:
  """Holds a request to the engine: its ticket, its latest report, and when its text began."""

  def __init__(self, request: Request):
    self.request = request
    self.ticket: Ticket | None = None
    self.latest: Update | None = None
    self.fresh = self.done = False
    self.first_text: float | None = None


class Asked:
  """Asks for several answers; a context that cancels those that are not done when it ends.

  Belongs to the event loop in which it is entered.
  """

  def __init__(
    self,
    served: Served,
    metrics: Metrics,
    requests: Sequence[Request],
    *,
    flexible: bool,
    param: str,
  ):
    """Prepares the requests.

    Args:
      served: the model.
      metrics: get the times and tokens of the answers.
      requests: one for each answer.
      flexible: whether an answer may be shorter than its settings say, to fit behind its prompt.
      param: names the field of the question in errors.
    """
    self._served, self._metrics, self._param = served, metrics, param
    self._all, self._flexible = [_One(request) for request in requests], flexible
    self._news = asyncio.Event()
    self._refusal: ApiError | None = None
    self._since = time.monotonic()

  def __enter__(self) -> Self:
    """Submits the requests. Raises: ApiError when the engine takes no more."""
    self._loop = asyncio.get_running_loop()
    try:
      for one in self._all:
        self._submit(one)
    except BaseException:
      self._cancel()
      raise
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    self._cancel()

  def abandon(self, refusal: ApiError) -> None:
    """Ends the waiting: `updates` raises `refusal`. To be called in the event loop."""
    self._refusal = refusal
    self._news.set()

  async def updates(self) -> AsyncGenerator[tuple[int, Update], None]:
    """Yields (index of the request, its latest report) until all have their answers.

    Reports are skipped if newer ones came before they were asked for.

    Raises: ApiError for a request that has no answer, or after `abandon`.
    """
    while not all(one.done for one in self._all):
      await self._news.wait()
      self._news.clear()
      if self._refusal:
        raise self._refusal
      for index, one in enumerate(self._all):
        update = one.latest
        if not one.fresh or update is None:
          continue
        one.fresh = False
        if self._again(one, update.answer):
          continue
        one.done = update.answer is not None
        self._check(one, update)
        yield index, update

  async def answers(self) -> list[Answer]:
    """Returns all answers, in the order of the requests. Raises: as `updates`."""
    found: dict[int, Answer] = {}
    async for index, update in self.updates():
      if update.answer is not None:
        found[index] = update.answer
    return [found[index] for index in range(len(self._all))]

  def _submit(self, one: _One) -> None:
    try:
      one.ticket = self._served.service.submit(one.request, lambda update: self._hear(one, update))
    except tuple(REFUSALS) as error:
      raise ApiError(REFUSALS[type(error)], str(error)) from None

  def _hear(self, one: _One, update: Update) -> None:
    """Takes a report of the engine, in its thread."""
    with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits
      self._loop.call_soon_threadsafe(self._take, one, update)

  def _take(self, one: _One, update: Update) -> None:
    answer = update.answer
    if one.first_text is None and (update.text or answer is not None):
      one.first_text = time.monotonic()
    if answer is not None and not answer.error and one.first_text is not None:
      self._metrics.answered(answer, self._since, update.begun, one.first_text)
    one.latest, one.fresh = update, True
    self._news.set()

  def _room(self, one: _One, answer: Answer) -> int | None:
    """Returns how many tokens fit behind a prompt, if that is why there is no answer."""
    generation = one.request.generation or self._served.generation
    known = one.ticket.prompt_tokens if one.ticket else None
    room = self._served.longest - (known or 0)
    return room if answer.error and room < generation.max_new_tokens else None

  def _again(self, one: _One, answer: Answer | None) -> bool:
    """Asks for a shorter answer if that would fit behind its prompt; returns whether it did."""
    room = self._room(one, answer) if answer is not None else None
    if not self._flexible or room is None or room < 1:
      return False
    generation = one.request.generation or self._served.generation
    shorter = dataclasses.replace(
      generation, max_new_tokens=room, min_new_tokens=min(generation.min_new_tokens, room)
    )
    one.request = dataclasses.replace(one.request, generation=shorter)
    one.first_text = None
    self._submit(one)
    return True

  def _check(self, one: _One, update: Update) -> None:
    """Raises the ApiError of a request without an answer."""
    if update.failed:
      raise ApiError("internal_error", FAILED)
    answer = update.answer
    if answer is None or not answer.error:
      return
    code = "invalid_image" if one.request.images else "invalid_value"
    if self._room(one, answer) is not None:
      code = "context_length_exceeded"
    raise ApiError(code, answer.error, self._param)

  def _cancel(self) -> None:
    for one in self._all:
      if one.ticket is not None and not one.done:
        one.ticket.cancel()
