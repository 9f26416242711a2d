"""The other endpoints, keys, web pages of others, and ids of requests, over HTTP."""

from __future__ import annotations

import json
import re
import shutil
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llava_sp_jax import __version__
from llava_sp_jax.serve import openapi
from tests.serve import fake
from tests.serve.fake import FakeService
from tests.serve.live import Live, live, wait_until
from tests.serve.pictures import data_url, encoded
from tests.serve.requests import body, text, user

CHAT, PAGE = "/v1/chat/completions", "https://page.example"


@pytest.fixture(scope="module")
def locked() -> Iterator[Live]:
  """A server with keys, a page that may ask, and a path before its own."""
  with live(
    fake.served(FakeService()),
    keys=("one", "two"),
    origins=(PAGE,),
    running={"root_path": "/proxied"},
  ) as found:
    yield found


# ---- what each gives ----


def test_models(client: openai.OpenAI) -> None:
  first, second = client.models.list().data
  assert (first.id, second.id, first.object, first.owned_by) == (
    "tiny",
    "other",
    "model",
    "llava-sp",
  )
  assert first.to_dict()["max_model_len"] == fake.LONGEST


def test_a_model_is_asked_for_by_any_of_its_names(client: openai.OpenAI) -> None:
  found = client.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}])
  assert found.model == "other"


def test_completions(client: openai.OpenAI, service: FakeService) -> None:
  more: Any = {"max_tokens": 4, "extra_body": {"ignore_eos": True}}
  found = client.completions.create(model="tiny", prompt="what is it?", **more)
  assert found.object == "text_completion"
  assert service.asked[-1].question == "what is it?"
  assert found.choices[0].text
  assert found.usage is not None
  assert found.usage.prompt_tokens == 4
  with client.completions.create(
    model="tiny",
    prompt="what is it?",
    stream=True,
    stream_options={"include_usage": True},
    **more,
  ) as stream:
    *parts, last = list(stream)
  assert "".join(part.choices[0].text for part in parts) == found.choices[0].text
  assert parts[-1].choices[0].finish_reason == found.choices[0].finish_reason
  assert (last.choices, last.usage) == ([], found.usage)


def test_a_completion_names_its_own_field(client: openai.OpenAI) -> None:
  for prompt, code in (
    ("a <image>", "invalid_value"),
    ("refuse it", "invalid_value"),
    ("word " * fake.LONGEST, "context_length_exceeded"),
  ):
    with pytest.raises(openai.BadRequestError) as caught:
      client.completions.create(model="tiny", prompt=prompt)
    assert (caught.value.code, caught.value.param) == (code, "prompt")


def test_tokens(server: Live) -> None:
  found = server.ask("POST", "/tokenize", json.dumps({"prompt": "what is it?"}).encode()).json
  assert found == {"count": 4, "max_model_len": fake.LONGEST, "tokens": [0, 1, 2, 3]}
  picture = {"type": "image_url", "image_url": {"url": data_url(encoded())}}
  talk = body(messages=[user(picture, text("what is it?"))])
  found = server.ask("POST", "/tokenize", talk).json
  assert found["count"] == 4 + fake.PICTURE
  assert found["tokens"].count(-1) == fake.PICTURE
  assert found["count"] == server.ask("POST", CHAT, talk).json["usage"]["prompt_tokens"]


def test_the_others(server: Live) -> None:
  assert server.ask("GET", "/health").status == server.ask("GET", "/ping").status == 200
  assert server.ask("GET", "/version").json == {"version": __version__}
  found = server.ask("GET", "/openapi.json").json
  assert set(found["paths"]) == {endpoint.path for endpoint in openapi.ENDPOINTS}
  assert found["servers"] == [{"url": "/"}]


@pytest.mark.parametrize(
  "path", ["/", "/v1", "/v1/", "/v1/models/", "/v2/models", "/v1/embeddings"]
)
def test_unknown_paths(server: Live, path: str) -> None:
  found = server.ask("GET", path)
  assert (found.status, found.error["code"]) == (404, "not_found")
  assert "/v1/chat/completions" in found.error["message"]


@pytest.mark.parametrize(
  ("method", "path", "allowed"),
  [
    ("GET", CHAT, "POST"),
    ("PUT", CHAT, "POST"),
    ("DELETE", "/health", "GET"),
    ("BREW", CHAT, "POST"),
  ],
)
def test_other_methods(server: Live, method: str, path: str, allowed: str) -> None:
  found = server.ask(method, path)
  assert (found.status, found.error["code"]) == (405, "method_not_allowed")
  assert allowed in found.headers["allow"]


def test_a_head_has_no_body(server: Live) -> None:
  found = server.ask("HEAD", "/version")
  assert (found.status, found.body) == (200, b"")


# ---- keys ----


@pytest.mark.parametrize("key", ["one", "two"])
def test_right_keys(locked: Live, key: str) -> None:
  with locked.client(key) as client:
    assert client.models.list().data
    assert client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])


@pytest.mark.parametrize("key", ["three", "on", "onee"])
def test_wrong_keys(locked: Live, key: str) -> None:
  with locked.client(key) as client:
    for start in (
      client.models.list,
      lambda: client.completions.create(model="tiny", prompt="a"),
    ):
      with pytest.raises(openai.AuthenticationError) as caught:
        start()
      assert caught.value.code == "invalid_api_key"


def test_a_key_comes_before_the_body(locked: Live) -> None:
  for path in (CHAT, "/v1/completions", "/v1/models", "/tokenize"):
    method = "GET" if path.endswith("models") else "POST"
    found = locked.ask(method, path, None if method == "GET" else b"no JSON")
    assert (found.status, found.error["type"]) == (401, "authentication_error")
    assert found.headers["www-authenticate"] == "Bearer"
  found = locked.ask("POST", "/tokenize", body(), {"authorization": "Bearer two"})
  assert found.status == 200


@pytest.mark.parametrize("path", ["/health", "/ping", "/version", "/metrics", "/openapi.json"])
def test_paths_without_a_key(locked: Live, path: str) -> None:
  assert locked.ask("GET", path).status == 200


# ---- web pages ----


def test_a_page_that_may_ask(locked: Live) -> None:
  wanted = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
  }
  found = locked.ask("OPTIONS", CHAT, headers=wanted)
  assert found.status == 200
  assert found.headers["access-control-allow-origin"] == PAGE
  assert "POST" in found.headers["access-control-allow-methods"]
  found = locked.ask("POST", CHAT, body(), {"origin": PAGE, "authorization": "Bearer one"})
  assert found.status == 200
  assert found.headers["access-control-allow-origin"] == PAGE
  found = locked.ask("POST", CHAT, body(), {"origin": PAGE})
  assert (found.status, found.headers["access-control-allow-origin"]) == (401, PAGE)
  shown = found.headers["access-control-expose-headers"].split(", ")
  assert {"x-request-id", "retry-after", "x-should-retry"} <= set(shown), (
    "clients try again by them"
  )


@pytest.mark.parametrize("origin", ["https://other.example", "null", f"{PAGE}.evil.example"])
def test_a_page_that_may_not_ask(locked: Live, origin: str) -> None:
  wanted = {"origin": origin, "access-control-request-method": "POST"}
  found = locked.ask("OPTIONS", CHAT, headers=wanted)
  assert (found.status, found.error["code"]) == (400, "cors_refused")
  assert "access-control-allow-origin" not in found.headers
  found = locked.ask("GET", "/version", headers={"origin": origin})
  assert "access-control-allow-origin" not in found.headers


def test_no_page_may_ask_by_default(server: Live) -> None:
  wanted = {"origin": PAGE, "access-control-request-method": "POST"}
  found = server.ask("OPTIONS", CHAT, headers=wanted)
  assert (found.status, found.error["code"]) == (405, "method_not_allowed")
  found = server.ask("GET", "/version", headers={"origin": PAGE})
  assert not [name for name in found.headers if name.startswith("access-control")]


def test_the_path_of_a_proxy(locked: Live) -> None:
  """The proxy takes it away; it stands in the document alone."""
  assert locked.ask("GET", "/openapi.json").json["servers"] == [{"url": "/proxied"}]
  assert locked.ask("GET", "/version").status == 200


# ---- ids ----


@pytest.mark.parametrize("path", ["/health", "/v1/none", "/metrics"])
def test_every_response_has_an_id(server: Live, path: str) -> None:
  one, two = (server.ask("GET", path).headers["x-request-id"] for _ in range(2))
  assert re.fullmatch(r"req_[0-9a-f]{32}", one)
  assert one != two


def test_an_id_of_the_client_is_kept(server: Live) -> None:
  given = "0f2c:a/B_c.1+2=3-4"
  assert (
    server.ask("GET", "/health", headers={"x-request-id": given}).headers["x-request-id"] == given
  )


@pytest.mark.parametrize("given", ["", "a b", "a\tb", "x" * 129, "ä", '"', "<b>"])
def test_an_id_that_could_mislead_a_log_is_not(server: Live, given: str) -> None:
  found = server.ask("GET", "/health", headers={"x-request-id": given.encode().decode("latin-1")})
  assert found.headers["x-request-id"].startswith("req_")


# ---- before it is ready ----


def test_a_server_that_warms_up() -> None:
  go = threading.Event()
  with live(
    fake.served(FakeService()), warm_up=lambda: go.wait(20) and None, ready=False
  ) as server:
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("POST", CHAT)):
      found = server.ask(method, path, body() if method == "POST" else None)
      assert (found.status, found.error["code"]) == (503, "not_ready")
      assert "warming up" in found.error["message"]
      assert found.headers["retry-after"]
    for path in ("/version", "/v1/models", "/metrics"):
      assert server.ask("GET", path).status == 200
    go.set()
    wait_until(lambda: server.ask("GET", "/health").status == 200)
    assert server.ask("POST", CHAT, body()).status == 200


def test_a_server_that_cannot_warm_up_ends() -> None:
  def broken() -> None:
    raise ValueError("no memory")

  with live(fake.served(FakeService()), warm_up=broken, ready=False) as server:
    wait_until(lambda: server.state.failure)
    assert str(server.state.failure) == "no memory"


def test_answers_match_the_document(server: Live) -> None:
  jsonschema = pytest.importorskip("jsonschema")
  document = server.ask("GET", "/openapi.json").json

  def check(name: str, value: Any) -> None:
    schema = {**document, "$ref": f"#/components/schemas/{name}"}
    jsonschema.Draft202012Validator(schema).validate(value)

  logged = {"logprobs": True, "top_logprobs": 2}
  check("ChatCompletion", server.ask("POST", CHAT, body(n=2, **logged)).json)
  check("Models", server.ask("GET", "/v1/models").json)
  check("Version", server.ask("GET", "/version").json)
  check("ErrorBody", server.ask("GET", "/none").json)
  check("Tokenized", server.ask("POST", "/tokenize", body()).json)
  stream = server.ask("POST", CHAT, body(stream=True, **logged)).body.decode()
  for event in stream.split("\n\n")[:-2]:
    check("ChatChunk", json.loads(event.removeprefix("data: ")))


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_https(tmp_path: Path) -> None:
  names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
  files = ("-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem"))
  kind = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1")
  subprocess.run(["openssl", *kind, *names, *files], check=True, capture_output=True)
  tls = {"ssl_certfile": tmp_path / "cert.pem", "ssl_keyfile": tmp_path / "key.pem"}
  with live(fake.served(FakeService()), running=tls) as server:
    trusted = ssl.create_default_context(cafile=tmp_path / "cert.pem")
    url = f"https://127.0.0.1:{server.port}/version"
    with urllib.request.urlopen(url, context=trusted) as found:
      assert json.load(found) == {"version": __version__}
    with server.connect() as connection:  # without TLS
      connection.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
      assert b"version" not in connection.recv(1 << 16)


def test_routes_beside_those_of_the_endpoints() -> None:
  async def page(http: Request) -> Response:
    return Response("a page")

  with live(fake.served(FakeService()), pages=[Route("/", page)]) as server:
    assert server.ask("GET", "/").body == b"a page"
    assert server.ask("GET", "/version").status == 200
    assert server.ask("POST", "/", b"{}").error["code"] == "method_not_allowed"


def test_the_log_has_a_line_for_each_request(
  server: Live, caplog: pytest.LogCaptureFixture
) -> None:
  """What a client sends cannot begin another line."""
  with caplog.at_level("INFO", logger="llava_sp_jax.serve.access"):
    server.ask("GET", "/no%0D%0Ayes%1B[2J", headers={"x-request-id": "mine"})
    wait_until(lambda: caplog.messages)
  (line,) = caplog.messages
  assert re.fullmatch(r"mine GET /no  yes\\x1b\[2J 404 \d\.\d{3} s", line)
