"""A judge's server that drips, floods, hangs up or asks to wait is bounded."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import Any

import pytest

from llava_sp_jax.tasks.judge import Ask, Endpoint, JudgeError
from tests.tasks.judge_server import KEY, Handler, Server


def drips(handler: Handler) -> None:
  """A byte now and then, for ever: no read waits long."""
  handler.send_response(200)
  handler.end_headers()
  while True:
    handler.wfile.write(b" ")
    handler.wfile.flush()
    time.sleep(0.01)


def drips_headers(handler: Handler) -> None:
  handler.wfile.write(b"HTTP/1.0 200 OK\r\nX: ")
  while True:
    handler.wfile.write(b"x")
    handler.wfile.flush()
    time.sleep(0.01)


def floods(handler: Handler) -> None:
  handler.send_response(200)
  handler.end_headers()
  while True:
    handler.wfile.write(b" " * (1 << 20))


def closes_early(handler: Handler) -> None:
  handler.send_response(200)
  handler.send_header("Content-Length", "1000")
  handler.end_headers()
  handler.wfile.write(b'{"choices": [')


def closes_at_once(handler: Handler) -> None:
  handler.connection.close()


@pytest.mark.parametrize(
  ("body", "calls", "message"),
  [
    (drips, 2, "no whole answer within 1 s"),
    (drips_headers, 2, "no whole answer within 1 s"),
    (floods, 1, "an answer of more than 4,194,304 bytes"),
    (closes_early, 2, "IncompleteRead"),
    (closes_at_once, 2, "RemoteDisconnected"),
  ],
)
def test_a_server_that_misbehaves_is_bounded(
  server: Server, monkeypatch: pytest.MonkeyPatch, body: Any, calls: int, message: str
) -> None:
  monkeypatch.setenv("JUDGE_KEY", KEY)
  url = f"http://127.0.0.1:{server.server_address[1]}/v1"
  seconds = 5 if body is floods else 1
  judge = Endpoint(url, "grader", "JUDGE_KEY", 2, seconds, pause=lambda seconds: None)
  server.script, started = [(200, body)] * 2, time.monotonic()
  with pytest.raises(JudgeError, match=message):
    judge(Ask(prompt="p"))
  assert time.monotonic() - started < 10
  assert len(server.seen) == calls
  if body is not floods:  # and what can be tried again is
    server.script = [(200, body)]
    assert judge(Ask(prompt="p")) == "fine"


@pytest.mark.parametrize(
  ("asked", "waited"), [("1000000000", 120), ("9" * 400, 120), ("3", 3), ("-5", None), ("²", None)]
)
def test_what_a_server_asks_to_wait_is_bounded(
  server: Server, endpoint: Endpoint, waits: list[float], asked: str, waited: float | None
) -> None:
  server.headers, server.script = {"retry-after": asked}, [(503, "later")]
  assert endpoint(Ask(prompt="p")) == "fine"
  assert waits[0] == waited or (waited is None and waits[0] < 2)


def test_a_deadline_holds_while_a_proxy_is_spoken_to(monkeypatch: pytest.MonkeyPatch) -> None:
  """It sends a byte now and then before there is any connection to the judge."""
  with socket.create_server(("127.0.0.1", 0)) as proxy:

    def drip() -> None:
      there, _ = proxy.accept()
      with there, contextlib.suppress(OSError):
        there.sendall(b"HTTP/1.1 200 OK\r\nX: ")
        while True:
          there.sendall(b"x")
          time.sleep(0.01)

    thread = threading.Thread(target=drip)
    thread.start()
    for name in ("https_proxy", "HTTPS_PROXY"):
      monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
    for name in ("no_proxy", "NO_PROXY"):
      monkeypatch.delenv(name, raising=False)
    judge = Endpoint("https://judge.example/v1", "grader", "", 1, 0.3, pause=lambda seconds: None)
    started = time.monotonic()
    with pytest.raises(JudgeError, match=r"no whole answer within 0\.3 s"):
      judge(Ask(prompt="p"))
    assert time.monotonic() - started < 5
    thread.join()
