"""Sends a POST to a web server, without redirects, with a deadline and a bound on the answer."""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import functools
import http.client
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from llava_sp_jax.errors import LlavaSPError

CHUNK = 1 << 16  # bytes


class TooLargeError(LlavaSPError, RuntimeError):
  """Reports an answer that is larger than allowed."""


@dataclasses.dataclass(frozen=True)
class Response:
  """Holds the answer of a server."""

  status: int
  body: bytes
  headers: Any  # a mapping with case-insensitive keys

  @property
  def moved(self) -> str:
    """Returns a description of a redirect (status 300 to 399); "" for any other answer."""
    if not 300 <= self.status < 400:
      return ""
    to = self.headers.get("Location", "nowhere")
    return f"a redirect to {to!r:.200}, which is not followed; give the address that answers"

  def wait(self, otherwise: float) -> float:
    """Returns the seconds that the header Retry-After asks to wait, without a limit.

    It may hold a number or a date. Without one that can be read, returns `otherwise`.
    """
    told = self.headers.get("Retry-After", "").strip()
    if told.isascii() and told.isdecimal():
      return float(told)
    try:  # a date in place of seconds
      until = email.utils.parsedate_to_datetime(told).timestamp()
    except (ValueError, TypeError, OverflowError, OSError):
      return otherwise
    return max(0.0, until - time.time())


class _Deadline:
  """Shuts a connection down when its time is over, even while data arrive."""

  def __init__(self) -> None:
    self.over = False
    self._socket: socket.socket | None = None
    self._lock = threading.Lock()

  def watch(self, connected: socket.socket) -> None:
    """Registers the connection's socket. Raises: TimeoutError when the time is over already."""
    with self._lock:
      self._socket = connected
      if self.over:
        raise TimeoutError

  def end(self) -> None:
    """Shuts the connection down, now or as soon as it is registered."""
    with self._lock:
      self.over = True
      if self._socket is not None:
        with contextlib.suppress(OSError):
          self._socket.shutdown(socket.SHUT_RDWR)

  @contextlib.contextmanager
  def of(self, seconds: float) -> Iterator[None]:
    """Limits a block to `seconds`. Raises: TimeoutError, in place of the connection's errors."""
    timer = threading.Timer(seconds, self.end)
    timer.daemon = True
    timer.start()
    try:
      yield
    except Exception:
      if self.over:
        raise TimeoutError(f"no whole answer within {seconds:g} s") from None
      raise
    finally:
      timer.cancel()
    if self.over:  # an answer without a length header ends silently when it is cut
      raise TimeoutError(f"no whole answer within {seconds:g} s")


def post(
  url: str, body: bytes, headers: Mapping[str, str], seconds: float, largest: int
) -> Response:
  """Sends a POST and returns the answer, whatever its status; uses the proxies of the environment.

  `seconds` is the time for the whole answer, `largest` the most bytes of it.

  Raises: TooLargeError for an answer of more than `largest` bytes; TimeoutError when all of it
    takes longer than `seconds`; OSError, http.client.HTTPException when the connection fails.
  """
  deadline = _Deadline()
  opener = urllib.request.OpenerDirector()
  for handler in (urllib.request.ProxyHandler(), _Plain(deadline), _Secure(deadline)):
    opener.add_handler(handler)
  request = urllib.request.Request(url, body, dict(headers))
  with deadline.of(seconds):
    found: Any = opener.open(request, timeout=seconds)
    if found is None:
      raise OSError(f"nobody can open {url!r}")
    with found as answer:
      return Response(answer.status, _read(answer, largest), answer.headers)


def _read(answer: Any, largest: int) -> bytes:
  parts, size = [], 0
  while part := answer.read1(CHUNK):
    parts.append(part)
    size += len(part)
    if size > largest:
      raise TooLargeError(f"an answer of more than {largest:,} bytes")
  if answer.length:  # bytes that were announced and did not arrive
    raise http.client.IncompleteRead(b"".join(parts), answer.length)
  return b"".join(parts)


def _watched(kind: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
  """Returns a subclass of a connection that registers its socket with a `_Deadline`.

  It does so before and after the handshake with a proxy or TLS.
  """

  class Watched(kind):  # type: ignore[misc, valid-type]
    def __init__(self, *arguments: Any, deadline: _Deadline, **options: Any):
      super().__init__(*arguments, **options)
      self._deadline = deadline
      self._create_connection = self._open

    def _open(self, *arguments: Any) -> socket.socket:
      connected = socket.create_connection(*arguments)
      self._deadline.watch(connected)
      return connected

    def connect(self) -> None:
      super().connect()
      self._deadline.watch(self.sock)

  return Watched


_HTTP: Any = _watched(http.client.HTTPConnection)
_HTTPS: Any = _watched(http.client.HTTPSConnection)


class _Plain(urllib.request.HTTPHandler):
  def __init__(self, deadline: _Deadline):
    super().__init__()
    self._connect: Any = functools.partial(_HTTP, deadline=deadline)

  def http_open(self, request: urllib.request.Request) -> Any:
    return self.do_open(self._connect, request)


class _Secure(urllib.request.HTTPSHandler):
  def __init__(self, deadline: _Deadline):
    super().__init__()
    self._connect: Any = functools.partial(_HTTPS, deadline=deadline)

  def https_open(self, request: urllib.request.Request) -> Any:
    return self.do_open(self._connect, request)
