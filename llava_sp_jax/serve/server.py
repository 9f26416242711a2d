"""Runs the application on a socket: warms up, answers, and stops without breaking answers off."""

from __future__ import annotations

import contextlib
import functools
import gc
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from llava_sp_jax.serve.connections import Connection
from llava_sp_jax.serve.limits import Limits
from llava_sp_jax.serve.state import State

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LAST = 2.0  # seconds in which the errors of answers that were broken off are sent


def listen(host: str, port: int) -> socket.socket:
  """Returns a socket that is bound, so that a port in use is an error before a model is loaded.

  Raises: OSError for an address that is not this machine's, or in use.
  """
  with contextlib.ExitStack() as stack:
    try:
      found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
      family, kind, protocol, _, address = found[0]
      # Without its protocol, asyncio leaves Nagle's algorithm on: 40 ms for each answer and token.
      result = stack.enter_context(socket.socket(family, kind, protocol))
      result.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      result.bind(address)
    except OSError as error:
      raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
    stack.pop_all()
  return result


class Server(uvicorn.Server):
  """Serves an application until a signal: then it takes no new requests, and finishes the others.

  While it finishes them it still listens, so that /health says 503. After `stop_seconds`, or at a
  second signal, what is left gets an error. `warm_up` runs in a thread of its own at the start;
  until it is done, the server takes no requests, and if it raises, the server stops.

  What the process holds by then is left out of garbage collections until the server stops: one that
  visits all objects of JAX stops every thread for more than 0.1 s.
  """

  def __init__(
    self,
    app: ASGIApp,
    state: State,
    limits: Limits,
    warm_up: Callable[[], None],
    started: Callable[[], None] = lambda: None,
    **options: Any,
  ):
    """Prepares the server.

    Args:
      app: the application.
      state: of the application.
      limits: those of connections and of stopping hold here.
      warm_up: makes the engine ready.
      started: is called once requests are taken.
      options: of uvicorn, such as `root_path` and `ssl_certfile`.
    """
    protocol: Any = functools.partial(Connection, limits)
    config = uvicorn.Config(
      app,
      http=protocol,
      ws="none",
      loop="asyncio",
      lifespan="on",
      log_config=None,
      access_log=False,
      proxy_headers=False,
      server_header=False,
      h11_max_incomplete_event_size=limits.header_bytes,
      timeout_keep_alive=max(1, round(limits.idle_seconds)),
      timeout_graceful_shutdown=max(1, round(LAST)),
      **options,
    )
    super().__init__(config)
    self._state, self._limits = state, limits
    self._warm_up, self._ready = warm_up, started
    self._warming = threading.Thread(target=self._warm, name="llava-sp-warm-up", daemon=True)
    self._stop_by: float | None = None

  @property
  def warming(self) -> bool:
    """Returns whether the thread that warms up still runs."""
    return self._warming.is_alive()

  def handle_exit(self, sig: int, frame: FrameType | None) -> None:
    """Begins to stop; at the second signal, ends the waiting for answers."""
    del sig, frame
    now = time.monotonic()
    self._stop_by = now if self._state.stopping else now + self._limits.stop_seconds
    self._state.stopping = True

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    """Begins to listen and to warm up."""
    await super().startup(sockets)
    self._warming.start()

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    """Closes connections and the application."""
    await super().shutdown(sockets)
    gc.unfreeze()

  async def on_tick(self, counter: int) -> bool:
    """Returns whether the server stops now; it is called every 0.1 s."""
    if self._state.failure is not None:
      return True
    if self._stop_by is None:
      return await super().on_tick(counter)
    if self._state.busy and time.monotonic() < self._stop_by:
      return False
    self._state.abandon()
    return True

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Hears signals within the block, in the main thread; they do not end the process behind it."""
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    before = {number: signal.signal(number, self.handle_exit) for number in SIGNALS}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  def _warm(self) -> None:
    try:
      self._warm_up()
    except BaseException as error:
      self._state.failure = error
      return
    gc.collect()
    gc.freeze()
    self._state.ready = True
    self._ready()
