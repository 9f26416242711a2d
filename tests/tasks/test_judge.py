"""Judges behind a real HTTP server that fails on purpose."""

from __future__ import annotations

import email.utils
import socket
import ssl
import threading
import time
import urllib.error
from typing import Any

import pytest

from llava_sp_jax.tasks import web
from llava_sp_jax.tasks.judge import Ask, Endpoint, JudgeError
from tests.tasks.judge_server import KEY, Server


def test_what_is_sent(server: Server, endpoint: Endpoint) -> None:
  assert endpoint(Ask(prompt="p", system="s", max_tokens=3, temperature=0.5)) == "fine"
  ((path, authorization, body),) = server.seen
  assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
  assert body == {
    "model": "grader",
    "max_tokens": 3,
    "temperature": 0.5,
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}],
  }


def test_what_may_pass_is_tried_again(
  server: Server, endpoint: Endpoint, waits: list[float]
) -> None:
  server.script = [(500, "oh"), (429, "slower")]
  assert endpoint(Ask(prompt="p")) == "fine"
  assert len(server.seen) == 3
  assert 0.75 <= waits[0] <= 1.25  # then doubling, unless the server says when
  assert waits[1] == 7


@pytest.mark.parametrize(
  ("answer", "calls", "message"),
  [
    ((401, f"bad key {KEY}"), 1, "status 401: bad key (key)"),
    ((401, "x" * 290 + KEY), 1, "x" * 290 + "(key)"),
    ((503, "down"), 3, "status 503: down"),
    ((200, "no json"), 3, "JSONDecodeError"),
    ((200, {"choices": []}), 3, "without choices"),
    ((200, {"choices": [{"message": {"content": " "}}]}), 3, "an empty answer"),
    ((200, {"choices": [{"message": {"content": [{"type": "image"}]}}]}), 3, "no text: [{"),
  ],
)
def test_failures_are_told_without_the_key(
  server: Server, endpoint: Endpoint, answer: tuple[int, Any], calls: int, message: str
) -> None:
  server.script = [answer] * 3
  with pytest.raises(JudgeError) as caught:
    endpoint(Ask(prompt="p"))
  assert message in str(caught.value)
  assert KEY[:6] not in str(caught.value)
  assert len(server.seen) == calls


def test_an_answer_in_parts_is_its_text(server: Server, endpoint: Endpoint) -> None:
  parts = [
    {"type": "reasoning", "text": "so 9"},
    {"type": "text", "text": "8"},
    {"type": "text", "text": " 7"},
    "?",
  ]
  server.script = [(200, {"choices": [{"message": {"content": parts}}]})]
  assert endpoint(Ask(prompt="p")) == "8 7"


def test_a_server_may_name_the_hour(server: Server, endpoint: Endpoint, waits: list[float]) -> None:
  for seconds, least, most in ((50, 40, 50), (-500, 0, 0), (10**6, 120, 120)):
    until = email.utils.formatdate(time.time() + seconds, usegmt=True)
    server.headers, server.script = {"retry-after": until}, [(503, "later")]
    assert endpoint(Ask(prompt="p")) == "fine"
    assert least <= waits.pop() <= most


def test_no_redirect_is_followed(server: Server, endpoint: Endpoint) -> None:
  """The key would travel to whatever host the answer names."""
  with Server() as other:
    thread = threading.Thread(target=other.serve_forever, args=(0.01,))
    thread.start()
    address = f"http://127.0.0.1:{other.server_address[1]}/v1/chat/completions"
    server.headers = {"Location": address}
    for status in (301, 302, 303, 307, 308):
      server.script = [(status, "")]
      with pytest.raises(
        JudgeError, match=rf"status {status}: a redirect to '{address}', which is"
      ):
        endpoint(Ask(prompt="p"))
    other.shutdown()
    thread.join()
  assert len(server.seen) == 5  # and none is asked twice
  assert not other.seen


@pytest.mark.parametrize("url", ["file:///etc/passwd", "localhost:8000/v1", "", "ftp://x"])
def test_only_web_servers_are_asked(url: str) -> None:
  with pytest.raises(JudgeError, match=r"expected an address http://\.\.\. or https"):
    Endpoint(url, "grader", key="")


def test_no_server_is_an_error_too(waits: list[float]) -> None:
  judge = Endpoint("http://127.0.0.1:9/v1", "grader", key="", tries=2, pause=waits.append)
  with pytest.raises(JudgeError, match=r"127\.0\.0\.1:9"):
    judge(Ask(prompt="p"))
  assert len(waits) == 1


def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.delenv("JUDGE_KEY", raising=False)
  with pytest.raises(JudgeError, match="set the variable JUDGE_KEY"):
    Endpoint("http://127.0.0.1:9", "grader", "JUDGE_KEY")


def test_a_key_that_no_header_can_hold_is_not_told(
  server: Server, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
  """http.client quotes such a header in its message, escaped, so that it is not found in it."""
  monkeypatch.setenv("JUDGE_KEY", f" {KEY}\r\n")
  assert endpoint(Ask(prompt="p")) == "fine"
  assert server.seen[0][1] == f"Bearer {KEY}"
  for secret in (f"{KEY}\nsecond line", f"{KEY}\x07", f"{KEY}\u20ac"):
    monkeypatch.setenv("JUDGE_KEY", secret)
    with pytest.raises(JudgeError, match="JUDGE_KEY, holds characters that no header") as caught:
      endpoint(Ask(prompt="p"))
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
  "url",
  ["http://", "https:///v1", "http://x:0/v1", "http://x:70000/v1", "http://x:y/v1", "http://[::1/v1",
   "http://x/v1?key=1", "http://x/v1#a", "http://x y/v1", "http://x/\x1b[2J", "http://é/v1",
   "http://%00/v1", "http://.../v1", f"http://{'a' * 70}.com/v1"],
)  # fmt: skip
def test_an_address_that_cannot_be_asked_is_told_before_anything_is(url: str) -> None:
  with pytest.raises(JudgeError, match=r"judge grader: expected an address http") as caught:
    Endpoint(url, "grader", key="")
  assert repr(url) in str(caught.value)


def test_a_password_in_an_address_is_not_told() -> None:
  with pytest.raises(JudgeError, match="found one with a user") as caught:
    Endpoint("https://user:hunter2@x/v1", "grader", key="")
  assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
  ("problem", "tries"),
  [
    (urllib.error.URLError(ssl.SSLCertVerificationError(1, "self-signed certificate")), 1),
    (urllib.error.URLError(socket.gaierror(socket.EAI_NONAME, "Name or service not known")), 1),
    (urllib.error.URLError(socket.gaierror(socket.EAI_AGAIN, "Temporary failure")), 3),
    (ConnectionResetError("reset"), 3),
  ],
)
def test_what_lasts_is_not_tried_again(
  endpoint: Endpoint,
  monkeypatch: pytest.MonkeyPatch,
  waits: list[float],
  problem: Exception,
  tries: int,
) -> None:
  calls = []

  def post(*_: Any) -> None:
    calls.append(1)
    raise problem

  monkeypatch.setattr(web, "post", post)
  with pytest.raises(JudgeError, match=type(problem).__name__):
    endpoint(Ask(prompt="p"))
  assert (len(calls), len(waits)) == (tries, tries - 1)


def test_an_error_in_place_of_an_answer_is_told(server: Server, endpoint: Endpoint) -> None:
  server.script = [(200, {"error": {"code": 402, "message": f"no credit for {KEY}"}})] * 3
  with pytest.raises(JudgeError, match=r"without choices.*no credit for \(key\)") as caught:
    endpoint(Ask(prompt="p"))
  assert KEY not in str(caught.value)
