"""Clients that mean harm: refused with a typed error, while others are answered as before.

The process stays small, and its event loop goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Iterator

import pytest

from llava_sp_jax.serve.limits import DEFAULT
from tests.serve import fake
from tests.serve.fake import FakeService
from tests.serve.live import Live, live, wait_until
from tests.serve.pictures import data_url, encoded, png_of
from tests.serve.requests import body, text, user
from tests.serve.stalls import LARGE, alive, decoding

CHAT = "/v1/chat/completions"
LIMITS = dataclasses.replace(DEFAULT, connections=20, held_bytes=48 << 20)
HASTY = dataclasses.replace(LIMITS, body_seconds=1.0, idle_seconds=1.0)
HOSTS = ("localhost", "127.0.0.1", "169.254.169.254", "0x7f.1", "[::1]", "picture.invalid")


@pytest.fixture(scope="module")
def service() -> FakeService:
  return FakeService()


@pytest.fixture(scope="module")
def server(service: FakeService) -> Iterator[Live]:
  with live(fake.served(service), LIMITS, hosts=HOSTS) as found:
    yield found


@pytest.fixture(scope="module")
def hasty(service: FakeService) -> Iterator[Live]:
  """A server that waits a second for a client, where `server` waits as long as users' servers do."""
  with live(fake.served(service), HASTY) as found:
    yield found


def send(server: Live, *parts: bytes) -> bytes:
  """All that the server sends until it closes the connection."""
  with server.connect() as connection:
    for part in parts:
      connection.sendall(part)
    return receive(connection)


def receive(connection: socket.socket) -> bytes:
  found = b""
  while part := connection.recv(1 << 16):
    found += part
  return found


def until(connection: socket.socket, end: bytes) -> bytes:
  """What the server sends up to some bytes."""
  found = b""
  while not found.endswith(end):
    part = connection.recv(1 << 16)
    assert part, f"the server closed the connection after {found!r}"
    found += part
  return found


def refusal(found: bytes) -> tuple[int, str]:
  """Status and code of a response as it came."""
  head, _, content = found.partition(b"\r\n\r\n")
  assert b"content-type: application/json" in head.lower()
  assert b"\r\nx-request-id: req_" in head.lower()
  return int(head.split()[1]), json.loads(content)["error"]["code"]


def head(length: int | str, path: str = CHAT, *others: str) -> bytes:
  lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *others]
  if length != "":
    lines.append(f"content-length: {length}")
  return ("\r\n".join(lines) + "\r\n\r\n").encode()


PICTURE = {"type": "image_url", "image_url": {"url": data_url(encoded())}}


def of(url: str) -> bytes:
  return body(messages=[user({"type": "image_url", "image_url": {"url": url}}, text("What?"))])


BODIES: dict[str, tuple[bytes, int, str]] = {
  "40 MB": (b" " * (40 << 20), 413, "request_too_large"),
  "deep lists": (b'{"messages": ' + b"[" * 500_000, 400, "invalid_json"),
  "a million digits": (b'{"n": ' + b"9" * 1_000_000 + b"}", 400, "too_many"),
  "a million names": (
    b"{" + b",".join(b'"k%d":1' % i for i in range(1_000_000)) + b"}",
    413,
    "request_too_large",
  ),
  "half of a surrogate": (body(messages=[user("XX")]).replace(b"XX", b"\\ud800"), 400, "invalid_json"),
  "broken UTF-8": (body(messages=[user("XX")]).replace(b"XX", b"\xff"), 400, "invalid_json"),
  "nothing": (b"", 400, "invalid_json"),
  "17 pictures": (body(messages=[user(*[PICTURE] * 17, text("?"))]), 400, "too_many"),
  "a picture of 65000x65000": (of(data_url(png_of(65000, 65000))), 400, "invalid_image"),
  "a picture of 25 MB": (of(data_url(b"\x89PNG\r\n\x1a\n" + b"0" * (22 << 20))), 400, "image_too_large"),
  "base64 of nothing": (of("data:image/png;base64,"), 400, "invalid_image"),
  "a file": (of("file:///etc/passwd"), 400, "invalid_image_url"),
  "a path": (of("/etc/passwd"), 400, "invalid_base64"),
  "a host that is not allowed": (of("http://example.com/a.png"), 400, "image_url_refused"),
  "a port that is not allowed": (of("http://localhost:22/"), 400, "image_url_refused"),
  "a user of a host": (of("http://a:b@picture.invalid/"), 400, "invalid_image_url"),
  "another scheme": (of("gopher://picture.invalid/"), 400, "invalid_image_url"),
  "a name of nothing": (of("http://picture.invalid/"), 400, "image_url_failed"),
  "a page": (of("data:text/html;base64,PGI+"), 400, "invalid_image"),
  "a page that says it is a picture": (of("data:image/png;base64,PGI+"), 400, "invalid_image"),
  **{  # addresses of this machine and its network, though their hosts are allowed
    url: (of(url), 400, code)
    for url, code in (
      ("http://127.0.0.1/", "image_url_refused"),
      ("http://localhost/", "image_url_refused"),
      ("http://LOCALHOST:80/", "image_url_refused"),
      ("http://[::1]/", "image_url_refused"),
      ("http://[::ffff:127.0.0.1]/", "image_url_refused"),
      ("http://169.254.169.254/latest/meta-data/", "image_url_refused"),
      ("http://10.0.0.1/", "image_url_refused"),
      ("http://0x7f.1/", "invalid_image_url"),
      ("http://0177.0.0.1/", "invalid_image_url"),
      ("http://2130706433/", "invalid_image_url"),
    )
  },
  "5 MB of text": (body(messages=[user("a b\n" * 1_250_000)]), 413, "request_too_large"),
  "a special token as a model": (body(model="</s>" * 100_000), 400, "too_many"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "status", "code"), BODIES.values(), ids=BODIES.keys())
def test_hostile_bodies(server: Live, content: bytes, status: int, code: str) -> None:
  with alive(server):
    found = server.ask("POST", CHAT, content)
  assert (found.status, found.error["code"]) == (status, code)


def test_a_large_picture_stalls_nobody(server: Live) -> None:
  """The event loop takes its body, and leaves its JSON and its base64 to another thread."""
  sent = of(data_url(encoded() + b"0" * (18 << 20)))
  longest = []
  for _ in range(3):  # what the loop does itself it does each time
    with alive(server) as work:
      assert server.ask("POST", CHAT, sent).status == 200
    longest.append(max(work))
  assert min(longest) < decoding() * len(sent) / LARGE / 2


HEADS: dict[str, tuple[bytes, int, str]] = {
  "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400, "invalid_http"),
  "a long line": (b"GET /" + b"a" * 20_000, 400, "invalid_http"),
  "long headers": (b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"a" * 20_000, 400, "invalid_http"),
  "many headers": (
    b"GET / HTTP/1.1\r\nhost: x\r\n" + b"".join(b"x%d: y\r\n" % i for i in range(3000)),
    400,
    "invalid_http",
  ),
  "two lengths": (head("5\r\ncontent-length: 6"), 400, "invalid_http"),
  "a length below 0": (head(-5), 400, "invalid_http"),
  "a length with chunks": (
    head(5, CHAT, "transfer-encoding: chunked", "connection: close") + b"0\r\n\r\n",
    400,
    "invalid_json",
  ),
  "a host that is none": (
    b"GET /none HTTP/1.1\r\nhost: [\r\nconnection: close\r\n\r\n",
    404,
    "not_found",
  ),
  "a path that is none": (
    b"GET //[::1?\x3c HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    404,
    "not_found",
  ),
  "a blank behind a name": (b"GET / HTTP/1.1\r\nhost: x\r\na : b\r\n\r\n", 400, "invalid_http"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "status", "code"), HEADS.values(), ids=HEADS.keys())
def test_hostile_heads(server: Live, content: bytes, status: int, code: str) -> None:
  with alive(server):
    found = send(server, content)
  assert refusal(found) == (status, code)


def test_another_protocol_is_not_offered(server: Live, caplog: pytest.LogCaptureFixture) -> None:
  """And whoever asks for one writes nothing into the log."""
  asked = (
    b"GET /version HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade, close\r\n\r\n"
  )
  found = send(server, asked)
  assert found.startswith(b"HTTP/1.1 200")
  assert not caplog.messages


@pytest.mark.parametrize(
  ("headers", "code"),
  [
    ({"content-type": "text/plain"}, "unsupported_media_type"),
    ({"content-type": "application/x-www-form-urlencoded"}, "unsupported_media_type"),
    ({"content-encoding": "gzip"}, "unsupported_media_type"),
    ({"content-length": str(10 << 30)}, "request_too_large"),
  ],
)
def test_hostile_headers(server: Live, headers: dict[str, str], code: str) -> None:
  """The first two can be sent by any web page, without its browser asking first."""
  found = server.ask("POST", CHAT, b"{}", headers)
  assert found.error["code"] == code


def test_a_body_that_drips(hasty: Live) -> None:
  with alive(hasty), hasty.connect() as connection:
    connection.sendall(head(1000))
    found = drip(connection)
  assert refusal(found) == (408, "request_timeout")


def test_a_head_that_drips(hasty: Live) -> None:
  with alive(hasty), hasty.connect() as connection:
    connection.sendall(b"GET /health HTTP/1.1\r\n")
    found = drip(connection)
  assert refusal(found) == (408, "request_timeout")


def drip(connection: socket.socket) -> bytes:
  """Sends a byte now and then, until something comes back."""
  connection.settimeout(0.05)
  for _ in range(100):
    with contextlib.suppress(TimeoutError):
      return receive_all(connection)
    connection.sendall(b"x")
  raise AssertionError("nothing comes back")


def receive_all(connection: socket.socket) -> bytes:
  found = connection.recv(1 << 16)
  connection.settimeout(5)
  with contextlib.suppress(ConnectionError):
    return found + receive(connection)
  return found


def test_a_connection_that_says_nothing(hasty: Live) -> None:
  assert send(hasty) == b""


def test_a_connection_is_used_again_but_not_kept(hasty: Live) -> None:
  get = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
  with hasty.connect() as connection:
    for _ in range(3):
      connection.sendall(get)
      assert until(connection, b"}").startswith(b"HTTP/1.1 200")
      time.sleep(0.1)
    assert receive(connection) == b"", "it is closed when nothing more comes"


def test_the_rest_of_a_refused_body_does_not_keep_a_connection(hasty: Live) -> None:
  """It is thrown away, but not for ever."""
  with hasty.connect() as connection:
    connection.sendall(head(10 << 30))
    assert b"request_too_large" in until(connection, b"}}")
    since = time.monotonic()
    with pytest.raises(ConnectionError):
      wait_until(lambda: connection.sendall(b"x" * 1000))
    assert time.monotonic() - since < 5


def test_too_many_connections(server: Live) -> None:
  with contextlib.ExitStack() as stack:
    for _ in range(LIMITS.connections):
      stack.enter_context(server.connect())
    wait_until(lambda: len(server.server.server_state.connections) >= LIMITS.connections)
    assert refusal(send(server)) == (503, "too_many_connections")
  wait_until(lambda: not server.server.server_state.connections)
  assert server.ask("GET", "/version").status == 200


def test_all_bodies_together_are_bounded(server: Live, service: FakeService) -> None:
  """Two requests of 20 MB are held while they are answered; a third one has no room."""
  large = body(messages=[user("silent")], new="x" * (20 << 20))
  with contextlib.ExitStack() as stack:
    before = len(service.asked)
    for _ in range(2):
      connection = stack.enter_context(server.connect())
      connection.sendall(head(len(large)) + large)
    wait_until(lambda: len(service.asked) == before + 2)
    found = server.ask("POST", CHAT, large)
    assert (found.status, found.error["code"]) == (429, "too_many_requests")
  wait_until(lambda: all(ticket.cancelled.is_set() for ticket in service.tickets[-2:]))
  assert server.ask("POST", CHAT, body(new="x" * (20 << 20))).status == 200


def test_a_client_that_does_not_read(hasty: Live, service: FakeService) -> None:
  """Its answer is cancelled, after the time that a connection may be idle."""
  asked = body(
    messages=[user("many words")], stream=True, ignore_eos=True, max_tokens=4000, logprobs=True,
    top_logprobs=12,
  )  # fmt: skip
  with socket.socket() as connection:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", hasty.port))
    before = len(service.tickets)
    connection.sendall(head(len(asked)) + asked)
    wait_until(lambda: len(service.tickets) > before)
    wait_until(lambda: not hasty.state.busy)


def test_a_pipeline_is_answered_in_order(server: Live) -> None:
  get = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
  last = b"GET /none HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
  found = send(server, get * 50 + last)
  assert found.count(b"HTTP/1.1 200") == 50
  assert b"HTTP/1.1 404" in found[found.rindex(b"HTTP/1.1 ") :]
