"""A server in a thread, on a free port."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import openai

from llava_sp_jax.serve.app import application
from llava_sp_jax.serve.limits import DEFAULT, Limits
from llava_sp_jax.serve.served import Served
from llava_sp_jax.serve.server import Server, listen
from llava_sp_jax.serve.state import State


@dataclasses.dataclass
class Reply:
  status: int
  headers: dict[str, str]
  body: bytes

  @property
  def json(self) -> Any:
    return json.loads(self.body)

  @property
  def error(self) -> Any:
    """The error, whose form is checked."""
    found = self.json["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert self.headers["content-type"] == "application/json"
    return found


@dataclasses.dataclass
class Live:
  port: int
  state: State
  server: Server

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.port}"

  def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(
      base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=20, **options
    )

  def ask(
    self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
  ) -> Reply:
    """Sends a request as it is; a body is JSON unless a header says otherwise."""
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
    given = {"content-type": "application/json"} if body is not None else {}
    try:
      connection.request(method, path, body, given | (headers or {}))
      found = connection.getresponse()
      return Reply(found.status, {k.lower(): v for k, v in found.getheaders()}, found.read())
    finally:
      connection.close()

  def connect(self) -> socket.socket:
    return socket.create_connection(("127.0.0.1", self.port), timeout=20)


@contextlib.contextmanager
def live(
  served: Served,
  limits: Limits = DEFAULT,
  *,
  warm_up: Callable[[], None] = lambda: None,
  ready: bool = True,
  running: dict[str, Any] | None = None,
  **options: Any,
) -> Iterator[Live]:
  """Runs a server for the block; `options` are those of `application`, `running` of `Server`."""
  state = State()
  app = application(served, state, limits, **options)
  sock = listen("127.0.0.1", 0)
  port = sock.getsockname()[1]
  server = Server(app, state, limits, warm_up, **(running or {}))
  thread = threading.Thread(target=server.run, args=([sock],))
  thread.start()
  try:
    wait_until(lambda: state.ready if ready else server.started)
    yield Live(port, state, server)
  finally:
    state.abandon()
    server.should_exit = True
    thread.join(60)  # a program may still compile
    assert not thread.is_alive(), where(thread)


def where(thread: threading.Thread) -> str:
  """Returns the lines that a thread stands in."""
  return "".join(traceback.format_stack(sys._current_frames()[thread.ident or 0]))


def wait_until(holds: Callable[[], object], seconds: float = 10) -> None:
  end = time.monotonic() + seconds
  while not holds():
    assert time.monotonic() < end, "it never holds"
    time.sleep(0.005)
