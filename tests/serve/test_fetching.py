"""Pictures by URL, in an internet of two addresses: 127.0.0.1 is public, 127.0.0.2 is not."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import itertools
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from llava_sp_jax.serve import addresses, fetching, pictures
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.fetching import Fetcher
from llava_sp_jax.serve.limits import DEFAULT, Limits
from tests.serve.pictures import SVG, encoded

LIMITS = dataclasses.replace(
  DEFAULT, picture_bytes=4096, fetch_seconds=30, fetch_redirects=2, picture_pixels=4096
)
PICTURE = encoded()
# What the name server answers, one call after another.
NAMES: dict[str, list[list[str]]] = {
  "good.test": [["127.0.0.1"]],
  "other.test": [["127.0.0.1"]],  # not allowed
  "private.test": [["127.0.0.2"]],
  "mixed.test": [["127.0.0.1", "127.0.0.2"]],
  "rebinding.test": [["127.0.0.1"], ["127.0.0.2"]],
}
ALLOWED = (*(name for name in NAMES if name != "other.test"), "unknown.test", "127.0.0.1", "::1")


async def endless(request: web.Request) -> web.StreamResponse:
  answer = web.StreamResponse()
  await answer.prepare(request)
  with contextlib.suppress(ConnectionError):
    while True:
      await answer.write(bytes(1024))
      await asyncio.sleep(0.001)
  return answer


async def slow(request: web.Request) -> web.Response:
  await asyncio.sleep(30)
  return web.Response()


class Internet:
  """Serves pages on 127.0.0.1, and records who was asked."""

  def __init__(self) -> None:
    self.asked: list[str] = []
    self.port = 0

  async def page(self, request: web.Request) -> web.StreamResponse:
    self.asked.append(f"{request.host.partition(':')[0]}{request.path}")
    places: dict[str, Callable[[], str]] = {
      "/hop": lambda: "/a.png",
      "/hops": lambda: "/hops",
      "/away": lambda: f"http://other.test:{self.port}/a.png",
      "/inside": lambda: f"http://private.test:{self.port}/a.png",
      "/loopback": lambda: f"http://127.0.0.2:{self.port}/a.png",
      "/file": lambda: "file:///etc/passwd",
      "/octal": lambda: f"http://0177.0.0.2:{self.port}/a.png",
    }
    if request.path in places:
      return web.Response(status=302, headers={"Location": places[request.path]()})
    if request.path in ("/endless", "/slow"):
      return await (endless if request.path == "/endless" else slow)(request)
    pages: dict[str, web.Response] = {
      "/a.png": web.Response(body=PICTURE),
      "/svg": web.Response(body=SVG, content_type="image/png"),
      "/large": web.Response(body=PICTURE + bytes(5000)),
      "/gzip": web.Response(body=PICTURE, headers={"Content-Encoding": "gzip"}),
      "/lost": web.Response(status=404),
      "/nowhere": web.Response(status=301),
    }
    return pages[request.path]

  @contextlib.asynccontextmanager
  async def running(self, limits: Limits) -> AsyncIterator[Fetcher]:
    server = web.Server(self.page, handler_cancellation=True)
    runner = web.ServerRunner(server, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    self.port = runner.addresses[0][1]
    fetcher = Fetcher([f"{host}:{self.port}" for host in ALLOWED], limits)
    try:
      yield fetcher
    finally:
      await fetcher.close()
      await runner.cleanup()


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Internet:
  calls = {
    name: itertools.chain(found, itertools.repeat(found[-1])) for name, found in NAMES.items()
  }

  def getaddrinfo(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
    if host not in calls:
      raise socket.gaierror(socket.EAI_NONAME, "unknown")
    return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in next(calls[host])]

  monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
  public = ipaddress.ip_address("127.0.0.1")
  monkeypatch.setattr(addresses, "is_public", lambda address: address == public)
  return Internet()


def read(internet: Internet, *urls: str, limits: Limits = LIMITS) -> tuple[bytes, ...]:
  async def run() -> tuple[bytes, ...]:
    async with internet.running(limits) as fetcher:
      named = [(url.replace("PORT", str(internet.port)), "image_url.url") for url in urls]
      return await pictures.read(named, limits, fetcher)

  return asyncio.run(run())


@pytest.mark.parametrize(
  "url",
  ["http://good.test:PORT/a.png", "http://127.0.0.1:PORT/a.png", "HTTP://GOOD.test:PORT/a.png",
   "http://good.test:PORT/hop", "http://rebinding.test:PORT/a.png"],
)  # fmt: skip
def test_allowed_hosts(internet: Internet, url: str) -> None:
  assert read(internet, url) == (PICTURE,)


REFUSED = {
  # name: (URL, code, part of the message)
  "another host": ("http://other.test:PORT/a.png", "image_url_refused", "not fetched from"),
  "another port": ("http://good.test:22/a.png", "image_url_refused", "port 22"),
  "the port of the scheme": ("http://good.test/a.png", "image_url_refused", "port 80"),
  "a name of a private address": ("http://private.test:PORT/a.png", "image_url_refused", "public"),
  "a name of both kinds": ("http://mixed.test:PORT/a.png", "image_url_refused", "not public"),
  "a private address": ("http://127.0.0.2:PORT/a.png", "image_url_refused", "not public"),
  "loopback of IPv6": ("http://[::1]:PORT/a.png", "image_url_refused", "not public"),
  "mapped to IPv6": ("http://[::ffff:127.0.0.2]:PORT/a", "image_url_refused", "not public"),
  "octal": ("http://0177.0.0.1:PORT/a.png", "invalid_image_url", "no valid host"),
  "decimal": ("http://2130706433:PORT/a.png", "invalid_image_url", "no valid host"),
  "hexadecimal": ("http://0x7f000001:PORT/a.png", "invalid_image_url", "no valid host"),
  "short": ("http://127.1:PORT/a.png", "invalid_image_url", "no valid host"),
  "digits of another script": ("http://１２７.１:PORT/a.png", "invalid_image_url", ""),
  "a user": ("http://good.test@other.test:PORT/a.png", "invalid_image_url", "without a user"),
  "a user and a host": ("http://good.test:PORT@127.0.0.2/", "invalid_image_url", "without a user"),
  "no host": ("http:///a.png", "invalid_image_url", "no valid host"),
  "a port that is no number": ("http://good.test:x/a.png", "invalid_image_url", "no valid host"),
  "a large port": ("http://good.test:99999/a.png", "invalid_image_url", "no valid host"),
  "a name that nobody knows": ("http://unknown.test:PORT/a.png", "image_url_failed", "fetched"),
  "a redirect to a private name": ("http://good.test:PORT/inside", "image_url_refused", "public"),
  "a redirect to loopback": ("http://good.test:PORT/loopback", "image_url_refused", "public"),
  "a redirect to another host": ("http://good.test:PORT/away", "image_url_refused", "other.test"),
  "a redirect to a file": ("http://good.test:PORT/file", "invalid_image_url", ""),
  "a redirect to octal": ("http://good.test:PORT/octal", "invalid_image_url", "no valid host"),
  "a redirect in a circle": ("http://good.test:PORT/hops", "image_url_failed", "2 redirects"),
  "a redirect to nowhere": ("http://good.test:PORT/nowhere", "image_url_failed", "redirects"),
  "SVG": ("http://good.test:PORT/svg", "invalid_image", "SVG"),
  "a long file": ("http://good.test:PORT/large", "image_too_large", "4,096"),
  "an endless file": ("http://good.test:PORT/endless", "image_too_large", "4,096"),
  "a compressed file": ("http://good.test:PORT/gzip", "image_url_failed", "'gzip'"),
  "a lost file": ("http://good.test:PORT/lost", "image_url_failed", "status 404"),
}


@pytest.mark.parametrize(("url", "code", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_urls(internet: Internet, url: str, code: str, says: str) -> None:
  with pytest.raises(ApiError) as caught:
    read(internet, url)
  error = caught.value
  assert (error.code, error.status, says in str(error)) == (code, 400, True), error
  assert "127.0.0.2" not in str(error)
  # Nobody but the allowed host was asked, and it no more than the limit says.
  assert {page.partition("/")[0] for page in internet.asked} <= {"good.test"}
  assert len(internet.asked) <= LIMITS.fetch_redirects + 1


@pytest.mark.parametrize("url", ["http://private.test/a", "https://PRIVATE.test:443/a"])
@pytest.mark.usefixtures("internet")
def test_a_host_without_a_port_allows_that_of_the_scheme(url: str) -> None:
  async def run() -> None:
    fetcher = Fetcher(["Private.test"], LIMITS)
    try:
      await fetcher.read(url, "x")
    finally:
      await fetcher.close()

  with pytest.raises(ApiError, match="address that is not public"):  # so the host is allowed
    asyncio.run(run())


@pytest.mark.parametrize("page", ["slow", "endless"])
def test_a_slow_host(internet: Internet, page: str) -> None:
  limits = dataclasses.replace(LIMITS, fetch_seconds=0.3, picture_bytes=1 << 40)
  with pytest.raises(ApiError, match=r"did not come within 0\.3 s") as caught:
    read(internet, f"http://good.test:PORT/{page}", limits=limits)
  assert caught.value.code == "image_url_failed"


def test_a_name_is_resolved_once_and_its_checked_address_is_used(internet: Internet) -> None:
  """The second answer of the name server, a private address, is refused by itself."""
  url = "http://rebinding.test:PORT/a.png"
  with pytest.raises(ApiError, match="not public"):
    read(internet, url, url)
  assert internet.asked == ["rebinding.test/a.png"]


def test_a_connection_is_checked_even_if_the_resolver_is_not(
  internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(fetching, "PublicResolver", aiohttp.ThreadedResolver)
  with pytest.raises(ApiError, match="not public"):
    read(internet, "http://private.test:PORT/a.png")


def test_environment_proxies_are_not_used(
  internet: Internet, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv("http_proxy", "http://127.0.0.2:9")
  assert read(internet, "http://good.test:PORT/a.png") == (PICTURE,)
