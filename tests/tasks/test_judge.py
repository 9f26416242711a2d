"""Judges behind a real HTTP server that fails on purpose."""

from __future__ import annotations

import contextlib
import email.utils
import http.server
import json
import socket
import ssl
import threading
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.tasks import llava_bench, mmvet, web
from llava_sp_jax.tasks.judge import Ask, Endpoint, JudgeError, Reviews

KEY = "sk-secret-123"


class Server(http.server.ThreadingHTTPServer):
  """Answers with what `script` holds, one (status, body) a call; then with "fine".

  A body that is a function of the handler writes itself, as a server that misbehaves.
  """

  daemon_threads = True

  def __init__(self) -> None:
    super().__init__(("127.0.0.1", 0), Handler)
    self.script: list[tuple[int, Any]] = []
    self.headers: dict[str, str] = {}
    self.seen: list[tuple[str, str | None, dict[str, Any]]] = []


class Handler(http.server.BaseHTTPRequestHandler):
  def do_POST(self) -> None:
    assert isinstance(self.server, Server)
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    self.server.seen.append((self.path, self.headers.get("Authorization"), body))
    fine = {"choices": [{"message": {"content": "fine"}}]}
    status, answer = self.server.script.pop(0) if self.server.script else (200, fine)
    if callable(answer):
      with contextlib.suppress(OSError):  # the judge has gone away
        answer(self)
      return
    text = answer if isinstance(answer, str) else json.dumps(answer)
    self.send_response(status)
    if status == 429:
      self.send_header("Retry-After", "7")
    for name, value in self.server.headers.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(text.encode())

  def log_message(self, *args: Any) -> None:
    """Nothing is printed."""


@pytest.fixture
def server() -> Iterator[Server]:
  made = Server()
  thread = threading.Thread(target=made.serve_forever, args=(0.01,))
  thread.start()
  yield made
  made.shutdown()
  made.server_close()
  thread.join()


@pytest.fixture
def waits() -> list[float]:
  return []


@pytest.fixture
def endpoint(server: Server, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Endpoint:
  monkeypatch.setenv("JUDGE_KEY", KEY)
  url = f"http://127.0.0.1:{server.server_address[1]}/v1/"
  return Endpoint(url, "grader", "JUDGE_KEY", tries=3, seconds=10, pause=waits.append)


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
    (drips, 2, "no whole answer within 0.3 s"),
    (drips_headers, 2, "no whole answer within 0.3 s"),
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
  seconds = 5 if body is floods else 0.3
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


def test_raw_answers_are_kept_and_failures_asked_again(tmp_path: Path) -> None:
  file, calls = tmp_path / "kept" / "reviews.jsonl", []

  def judge(ask: Ask) -> str:
    calls.append(ask.prompt)
    if ask.prompt == "bad" and calls.count("bad") == 1:
      raise ValueError("no")
    return f"raw {ask.prompt}"

  first = Reviews(judge, file)
  assert first(Ask(prompt="good")).text == "raw good"
  failed = first(Ask(prompt="bad"))
  assert (failed.text, failed.error) == ("", "ValueError: no")
  file.write_text(file.read_text() + '{"key": "torn')  # a run that was killed while writing
  second = Reviews(judge, file)
  assert second(Ask(prompt="good")).text == "raw good"
  assert second(Ask(prompt="bad")).text == "raw bad"
  assert calls == ["good", "bad", "bad"]
  third = Reviews(judge, file)
  assert third(Ask(prompt="bad")).text == "raw bad"
  assert third(Ask(prompt="bad", turn=1)).text == "raw bad"
  assert calls == ["good", "bad", "bad", "bad"]  # another turn is another question


def test_an_answer_of_no_use_is_asked_for_once_more_in_each_run(tmp_path: Path) -> None:
  said, calls = iter(["well, ...", "hm", "7"]), []

  def judge(ask: Ask) -> str:
    calls.append(ask)
    return next(said)

  def reads(text: str) -> int | None:
    return int(text) if text.isdigit() else None

  for run, wanted in enumerate(["well, ...", "hm", "7", "7"]):
    reviews = Reviews(judge, tmp_path / "reviews.jsonl")
    for _ in range(3):
      assert reviews(Ask(prompt="p"), reads).text == wanted
    assert len(calls) == min(run + 1, 3)


def test_another_judge_s_answers_are_not_taken(tmp_path: Path) -> None:
  def one(ask: Ask) -> str:
    return "1"

  def two(ask: Ask) -> str:
    return "2"

  for judge in (one, two):
    review = Reviews(judge, tmp_path / "reviews.jsonl")(Ask(prompt="p"))
    assert review.text == judge(Ask(prompt="p"))


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


@pytest.mark.parametrize(
  "said",
  [
    "85 90",
    "-1 -1",
    "8 11",
    "8 nan",
    "8 1_0",
    "8 \u0669",
    "inf 8",
    "<html>",
    "8",
    "8 9 7",
    "",
    "8/9",
  ],
)
def test_scores_outside_the_scale_are_none(said: str) -> None:
  """Others have counted -1 and numbers beyond the scale as scores."""
  assert llava_bench.pair(said) is None
  assert mmvet.grade(said.replace("8 ", "")) is None
  assert llava_bench.pair("8 9.5\r\nwell") == (8.0, 9.5)
  assert [mmvet.grade(text) for text in ("0.5", "1", "1.1", "-0.1", "0_1")] == [
    0.5,
    1,
    None,
    None,
    None,
  ]
