"""One POST to a web server: no redirects, a deadline over all of it, and a bounded answer."""

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
  """An answer that is larger than was allowed."""


@dataclasses.dataclass(frozen=True)
class Response:
  status: int
  body: bytes
  headers: Any  # a mapping whose keys have no case

  @property
  def moved(self) -> str:
    """What to tell of a redirect; empty for anything else."""
    if not 300 <= self.status < 400:
      return ""
    to = self.headers.get("Location", "nowhere")
    return f"a redirect to {to!r:.200}, which is not followed; give the address that answers"

  def wait(self, otherwise: float) -> float:
    """Seconds that the server asks to wait."""
    told = self.headers.get("Retry-After", "").strip()
    if told.isascii() and told.isdecimal():
      return float(told)
    try:  # the hour when it wants to be asked again
      until = email.utils.parsedate_to_datetime(told).timestamp()
    except (ValueError, TypeError, OverflowError, OSError):
      return otherwise
    return max(0.0, until - time.time())


class _Deadline:
  """Ends a connection when its time is over, whatever the other side is sending."""

  def __init__(self) -> None:
    self.over = False
    self._socket: socket.socket | None = None
    self._lock = threading.Lock()

  def watch(self, connected: socket.socket) -> None:
    """Raises: TimeoutError when the time is over already."""
    with self._lock:
      self._socket = connected
      if self.over:
        raise TimeoutError

  def end(self) -> None:
    with self._lock:
      self.over = True
      if self._socket is not None:
        with contextlib.suppress(OSError):
          self._socket.shutdown(socket.SHUT_RDWR)

  @contextlib.contextmanager
  def of(self, seconds: float) -> Iterator[None]:
    """Raises: TimeoutError in place of what a cut connection raises."""
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
    if self.over:  # an answer without a length, which was cut
      raise TimeoutError(f"no whole answer within {seconds:g} s")


def post(
  url: str, body: bytes, headers: Mapping[str, str], seconds: float, largest: int
) -> Response:
  """The answer, whatever its status; proxies are those of the environment.

  Raises: TooLargeError beyond `largest` bytes; TimeoutError after `seconds` in all; OSError,
    http.client.HTTPException for what went wrong on the way.
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
  if answer.length:  # bytes that were promised
    raise http.client.IncompleteRead(b"".join(parts), answer.length)
  return b"".join(parts)


def _watched(kind: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
  """A connection that tells a deadline of its socket, before a proxy or TLS is spoken to and after."""

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
