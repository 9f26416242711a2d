"""Sends answers while they are written, as server-sent events, and notices clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llava_sp_jax.serve import answers
from llava_sp_jax.serve.answers import ChatAnswer, TextAnswer
from llava_sp_jax.serve.asked import FAILED
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.metrics import Metrics
from llava_sp_jax.serve.probabilities import written
from llava_sp_jax.serve.served import Update

LOG = logging.getLogger(__name__)
Updates = AsyncGenerator[tuple[int, Update], None]  # index of an answer, its latest report
T = TypeVar("T")


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
  """Returns the result of `work`; cancels it as soon as the client closes the connection.

  The body of the request must have been read. Raises: ClientDisconnect when the client has left.
  """
  task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
  try:
    await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise ClientDisconnect
    return task.result()
  finally:
    task.cancel()
    gone.cancel()
    await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
  while (await receive())["type"] != "http.disconnect":
    pass


async def events(
  first: tuple[int, Update],
  updates: Updates,
  writer: ChatAnswer | TextAnswer,
  count: int,
  *,
  counted: bool,
) -> AsyncGenerator[bytes, None]:
  """Yields the events of `count` answers, without the one that ends the stream.

  Args:
    first: the first report.
    updates: the other reports.
    writer: writes the events.
    count: how many answers there are.
    counted: whether the last event has the numbers of tokens.
  """
  said, logged = [""] * count, [0] * count
  prompt_tokens, tokens = 0, [0] * count
  if isinstance(writer, ChatAnswer):
    for index in range(count):
      yield writer.first(index)
  async for index, update in _both(first, updates):
    answer = update.answer
    whole = update.text if answer is None else answer.text
    chosen = update.log_probabilities if answer is None else answer.log_probabilities or ()
    more, new = whole[len(said[index]) :], chosen[logged[index] :]
    said[index], logged[index] = whole, len(chosen)
    if isinstance(writer, ChatAnswer) and (more or new):
      yield writer.more(index, more, written(new) if new else None)
    elif isinstance(writer, TextAnswer) and more:
      yield writer.more(index, more)
    if answer is not None:
      prompt_tokens, tokens[index] = answer.prompt_tokens, answer.tokens
      yield writer.last(index, answer.reason)
  if counted:
    yield writer.counted(prompt_tokens, tokens)


async def _both(first: tuple[int, Update], updates: Updates) -> Updates:
  yield first
  async for each in updates:
    yield each


class EventStream(Response):
  """Is the response of a stream: its events, an error that ends it early, and the last event."""

  def __init__(
    self,
    content: AsyncGenerator[bytes, None],
    held: contextlib.AsyncExitStack,
    deadline: float,
    metrics: Metrics,
  ):
    """Prepares the response.

    Args:
      content: the events.
      held: what ends with the stream.
      deadline: the time of the event loop at which the stream ends with an error.
      metrics: count the error.
    """
    super().__init__(media_type=answers.STREAM)
    self._content, self._held = content, held
    self._deadline, self._metrics = deadline, metrics

  def init_headers(self, headers: object = None) -> None:
    """Says what the stream is, and that no proxy may keep it back; it has no length."""
    self.raw_headers = [
      (b"content-type", answers.STREAM.encode()),
      (b"cache-control", b"no-cache"),
      (b"x-accel-buffering", b"no"),
    ]

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Sends the stream, until its end or until the client has left."""
    async with self._held, contextlib.aclosing(self._content):
      with contextlib.suppress(ClientDisconnect):
        await unless_gone(receive, self._send(send))

  async def _send(self, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
    try:
      async with asyncio.timeout_at(self._deadline):
        async for event in self._content:
          await send({"type": "http.response.body", "body": event, "more_body": True})
    except TimeoutError:
      await self._refuse(send, ApiError("answer_timeout", answers.TOO_SLOW))
    except ApiError as error:
      await self._refuse(send, error)
    except Exception:
      LOG.exception("a stream failed")
      await self._refuse(send, ApiError("internal_error", FAILED))
    await send({"type": "http.response.body", "body": answers.DONE})

  async def _refuse(self, send: Send, error: ApiError) -> None:
    self._metrics.refused(error.code)
    event = answers.error_event(error)
    await send({"type": "http.response.body", "body": event, "more_body": True})
