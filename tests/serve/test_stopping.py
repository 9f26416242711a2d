"""Clients that leave, and servers that stop."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import signal
import socket
import threading
import time
from typing import Any

import openai
import pytest

from llava_sp_jax.serve.limits import DEFAULT
from tests.serve import fake
from tests.serve.conftest import Real
from tests.serve.fake import FakeService
from tests.serve.live import Live, live, wait_until
from tests.serve.requests import body, user

CHAT = "/v1/chat/completions"
SLOW = body(messages=[user("slow please")], ignore_eos=True, max_tokens=30)  # 0.6 s


# ---- clients that leave ----


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_what_nobody_waits_for_is_cancelled(
  server: Live, service: FakeService, stream: bool, count: int
) -> None:
  before = len(service.tickets)
  asked = body(messages=[user("slow please")], stream=stream, n=count, ignore_eos=True)
  connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
  connection.request("POST", CHAT, asked, {"content-type": "application/json"})
  wait_until(lambda: len(service.tickets) == before + count)
  if stream:
    assert connection.getresponse().read(10)
  assert connection.sock is not None or stream
  connection.close()
  for ticket in service.tickets[before:]:
    assert ticket.cancelled.wait(5)
  wait_until(lambda: not server.state.busy)


def test_a_stream_that_is_closed_is_cancelled(server: Live, service: FakeService) -> None:
  with server.client() as client:
    talk: Any = [user("slow please")]
    with client.chat.completions.create(
      model="tiny", messages=talk, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
      next(iter(stream))
  assert service.tickets[-1].cancelled.wait(5)


def test_what_is_done_is_not_cancelled(server: Live, service: FakeService) -> None:
  for stream in (False, True):
    assert server.ask("POST", CHAT, body(stream=stream)).status == 200
    assert not service.tickets[-1].cancelled.is_set()


def test_a_client_that_gives_up(server: Live, service: FakeService) -> None:
  async def leave() -> None:
    options: Any = {"base_url": f"{server.url}/v1", "api_key": "x", "max_retries": 0}
    async with openai.AsyncOpenAI(timeout=1, **options) as client:
      talk: Any = [user("silent")]
      with pytest.raises(openai.APITimeoutError):
        await client.chat.completions.create(model="tiny", messages=talk)

  asyncio.run(leave())
  assert service.tickets[-1].cancelled.wait(5)


def test_a_client_that_leaves_within_its_body(server: Live, service: FakeService) -> None:
  before = len(service.asked)
  with server.connect() as connection:
    connection.sendall(
      b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
      b"content-length: 100\r\n\r\n{"
    )
    wait_until(lambda: server.state.busy)
  wait_until(lambda: not server.state.busy)
  assert len(service.asked) == before


# ---- time ----


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(stream: bool) -> None:
  service = FakeService()
  limits = dataclasses.replace(DEFAULT, request_seconds=0.3)
  with live(fake.served(service), limits) as server, server.client() as client:
    talk: Any = [user("slow please")]
    with pytest.raises(openai.APIError) as caught:
      for _ in client.chat.completions.create(
        model="tiny", messages=talk, stream=stream, max_tokens=100, extra_body={"ignore_eos": True}
      ):
        pass
    assert caught.value.code == "answer_timeout"
    assert service.tickets[-1].cancelled.wait(5)
    found = server.ask("POST", CHAT, body(messages=[user("silent")], stream=stream))
    assert (found.status, found.headers["x-should-retry"]) == (504, "false")


# ---- servers that stop ----


def test_a_server_finishes_what_it_has_begun() -> None:
  with live(fake.served(FakeService())) as server:
    found: list[Any] = []
    threads = [
      threading.Thread(target=lambda: found.append(server.ask("POST", CHAT, SLOW))),
      threading.Thread(target=lambda: found.append(server.ask("POST", CHAT, streaming()))),
    ]
    for thread in threads:
      thread.start()
    wait_until(lambda: server.state._taken == 2)
    server.server.handle_exit(signal.SIGTERM, None)
    for method, path in (("GET", "/health"), ("POST", CHAT), ("POST", "/tokenize")):
      refused = server.ask(method, path, body() if method == "POST" else None)
      assert (refused.status, refused.error["code"]) == (503, "not_ready")
      assert "stopping" in refused.error["message"]
    assert server.ask("GET", "/metrics").status == 200
    for thread in threads:
      thread.join()
    assert [reply.status for reply in found] == [200, 200]
    whole = next(
      r.json["choices"][0]["message"]["content"] for r in found if b"[DONE]" not in r.body
    )
    (stream,) = (reply.body.decode() for reply in found if b"[DONE]" in reply.body)
    events = [json.loads(e.removeprefix("data: ")) for e in stream.split("\n\n")[:-2]]
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == whole
    wait_until(lambda: not server.server.server_state.connections)
    with pytest.raises(ConnectionRefusedError):  # a request could also be reset on its way
      wait_until(lambda: server.connect().close())


def streaming() -> bytes:
  return json.dumps({**json.loads(SLOW), "stream": True}).encode()


@pytest.mark.parametrize("again", [False, True])
def test_a_server_does_not_wait_for_ever(again: bool) -> None:
  """After its time, or at a second signal, what is left gets an error."""
  service = FakeService()
  limits = dataclasses.replace(DEFAULT, stop_seconds=60 if again else 0.3)
  with live(fake.served(service), limits) as server:
    found: list[Any] = []
    slow = body(messages=[user("slow please")], ignore_eos=True, max_tokens=4000, stream=True)
    silent = body(messages=[user("silent")])
    threads = [
      threading.Thread(target=lambda asked=asked: found.append(server.ask("POST", CHAT, asked)))
      for asked in (slow, silent)
    ]
    for thread in threads:
      thread.start()
    wait_until(lambda: len(service.tickets) == 2 and service.running == 2)
    time.sleep(0.1)
    server.server.handle_exit(signal.SIGTERM, None)
    if again:
      time.sleep(0.2)
      server.server.handle_exit(signal.SIGINT, None)
    for thread in threads:
      thread.join(10)
    stream, whole = sorted(found, key=lambda reply: reply.status)
    assert (whole.status, whole.error["code"]) == (503, "not_ready")
    assert stream.status == 200
    *_, error, done, _ = stream.body.decode().split("\n\n")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "not_ready"
    assert done == "data: [DONE]"
    assert all(ticket.cancelled.wait(5) for ticket in service.tickets)


def test_an_idle_server_stops_at_once() -> None:
  with live(fake.served(FakeService())) as server:
    connection = server.connect()  # kept open without a request
    wait_until(lambda: server.server.server_state.connections)
    since = time.monotonic()
    server.server.handle_exit(signal.SIGTERM, None)
    assert connection.recv(1) == b""
    connection.close()
    assert time.monotonic() - since < 2


def test_small_writes_are_sent_at_once(server: Live) -> None:
  with server.connect() as connection:
    wait_until(lambda: server.server.server_state.connections)
    (held,) = server.server.server_state.connections
    sent: socket.socket = held.transport.get_extra_info("socket")
    assert sent.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    connection.close()


# ---- for long ----


@pytest.mark.slow
def test_a_thousand_clients_that_leave_cost_no_row(real: Real) -> None:
  """Before, within and after their answers, whole and streamed."""
  server, service = real.server, real.service
  asked = [
    body(stream=stream, max_tokens=count, ignore_eos=True)
    for stream in (False, True)
    for count in (1, 64)
  ]
  for turn in range(1000):
    content = asked[turn % len(asked)]
    with server.connect() as connection:
      connection.sendall(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(content), content)
      )
      time.sleep(turn % 7 * 0.005)
  wait_until(lambda: not server.state.busy, 60)
  wait_until(lambda: not service.running and not service.waiting, 60)
  assert not server.server.server_state.connections
  request, answer = next(iter(real.answers.items()))
  found = server.ask("POST", CHAT, body(messages=[user(request.question)])).json
  assert found["choices"][0]["message"]["content"] == answer.text
