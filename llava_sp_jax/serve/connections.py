"""Bounds connections: how many are open, and how long one may be idle, slow or unread.

uvicorn waits for the head of a request, and for a client that does not read, without end.
"""

from __future__ import annotations

import asyncio
import http
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_sp_jax.serve import answers
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.limits import Limits
from llava_sp_jax.serve.middleware import ID, new_id


class Connection(H11Protocol):
  """Is a connection of HTTP/1.1 that is closed when it waits longer than `idle_seconds`.

  The time runs while there is no whole head of a request, whatever bytes come, and while the
  client reads nothing. Errors that come before a request is known have the typed body as well.
  """

  def __init__(self, limits: Limits, **given: Any):
    super().__init__(**given)
    self._limits = limits
    self._idle: asyncio.TimerHandle | None = None
    self._unread: asyncio.TimerHandle | None = None

  def connection_made(self, transport: Any) -> None:
    """Begins to wait for a request, or refuses a connection too many."""
    super().connection_made(transport)
    if len(self.connections) > self._limits.connections:
      message = f"{self._limits.connections:,} connections are open; ask again later"
      self._refuse(ApiError("too_many_connections", message))
    self._wait()

  def data_received(self, data: bytes) -> None:
    """Takes bytes; only the whole head of a request ends the waiting."""
    if not self.transport.is_closing():
      super().data_received(data)
      self._wait()

  def on_response_complete(self) -> None:
    """Begins to wait for the next request."""
    super().on_response_complete()
    self._wait()

  def pause_writing(self) -> None:
    """Begins to wait for the client to read."""
    super().pause_writing()
    self._unread = self.loop.call_later(self._limits.idle_seconds, self.transport.abort)

  def resume_writing(self) -> None:
    """Ends the waiting for the client to read."""
    super().resume_writing()
    _cancel(self._unread)

  def connection_lost(self, exc: Exception | None) -> None:
    """Ends all waiting."""
    super().connection_lost(exc)
    _cancel(self._idle)
    _cancel(self._unread)

  def _should_upgrade(self) -> bool:
    """Answers over HTTP; uvicorn would write to the log what to install, for any client."""
    return False

  def send_400_response(self, msg: str) -> None:
    """Answers bytes that are no HTTP."""
    most = self._limits.header_bytes
    message = f"no valid HTTP/1.1, or a line and headers of more than {most:,} bytes"
    self._refuse(ApiError("invalid_http", message))
    self._wait()

  def _wait(self) -> None:
    """Starts the clock of a connection without a request, and stops that of one with a request."""
    if self.cycle is not None and not self.cycle.response_complete:
      _cancel(self._idle)
      self._idle = None
    elif self._idle is None:
      self._idle = self.loop.call_later(self._limits.idle_seconds, self._waited)

  def _waited(self) -> None:
    if self.transport.is_closing():  # what is left to send is not read
      self.transport.abort()
      return
    seconds = f"{self._limits.idle_seconds:g} s"
    if self.conn.trailing_data[0]:
      message = f"after {seconds}, the head of the request was not complete; send it faster"
      self._refuse(ApiError("request_timeout", message))
    else:
      self.transport.close()
    self._idle = self.loop.call_later(self._limits.idle_seconds, self._waited)

  def _refuse(self, error: ApiError) -> None:
    """Writes an error and closes; behind a response that has begun, it closes alone."""
    if self.cycle is None or self.cycle.response_complete:
      self.transport.write(_response(error))
    self.transport.close()


def _response(error: ApiError) -> bytes:
  """Returns the response of an error, with its head."""
  body = answers.error(error)
  headers = {
    "content-type": answers.JSON,
    "content-length": str(len(body)),
    "connection": "close",
    ID: new_id(),
    **error.headers,
  }
  head = f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\n"
  head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
  return f"{head}\r\n".encode() + body


def _cancel(timer: asyncio.TimerHandle | None) -> None:
  if timer is not None:
    timer.cancel()
