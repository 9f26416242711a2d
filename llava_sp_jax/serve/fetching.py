"""Fetches pictures from hosts that are allowed, and connects to public addresses alone."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from typing import Any

import aiohttp
import aiohttp.abc
import yarl

from llava_sp_jax.serve import addresses
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.limits import Limits

PORTS = {"http": 80, "https": 443}  # scheme -> the port that a host without one allows
REDIRECTS = (301, 302, 303, 307, 308)
CHUNK = 1 << 16  # bytes that are read at once
_DO = "send the picture inline as 'data:image/png;base64,...'"


class RefusedAddressError(Exception):
  """Reports a host whose address is not public; not an OSError, so that no other one is tried."""


class PublicResolver(aiohttp.abc.AbstractResolver):
  """Resolves a name once, and refuses it unless all of its addresses are public.

  aiohttp connects to the addresses that this returns, so a second answer of the name server cannot
  change them.
  """

  def __init__(self) -> None:
    self._resolver = aiohttp.ThreadedResolver()

  async def resolve(
    self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
  ) -> list[aiohttp.abc.ResolveResult]:
    """Returns the addresses of a name. Raises: RefusedAddressError if one of them is not public."""
    found: list[aiohttp.abc.ResolveResult] = await self._resolver.resolve(host, port, family)
    for each in found:
      _check_address(each["host"])
    return found

  async def close(self) -> None:
    """Ends the resolver."""
    await self._resolver.close()


def _check_address(text: str) -> None:
  if not addresses.is_public(ipaddress.ip_address(text)):
    raise RefusedAddressError(text)


def _socket(info: Any) -> socket.socket:
  """Makes the socket of a connection, once more for public addresses alone.

  Every connection passes here with the address that it is made to, however its host was spelled.
  """
  family, kind, protocol, _, address = info
  _check_address(address[0])
  return socket.socket(family, kind, protocol)


class Fetcher:
  """Reads pictures by URL.

  `hosts` are allowed names, each `host` (with the port of the scheme) or `host:port`. Must be made,
  used and closed in one event loop.
  """

  def __init__(self, hosts: Collection[str], limits: Limits):
    self._hosts, self._limits = frozenset(host.lower() for host in hosts), limits
    connector = aiohttp.TCPConnector(
      resolver=PublicResolver(),
      socket_factory=_socket,
      use_dns_cache=False,
      force_close=True,
      limit=limits.pictures,
    )
    self._session = aiohttp.ClientSession(
      connector=connector,
      cookie_jar=aiohttp.DummyCookieJar(),
      trust_env=False,  # a proxy would connect to addresses of its own
      auto_decompress=False,
      headers={"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "llava-sp"},
    )

  async def close(self) -> None:
    """Closes all connections."""
    await self._session.close()

  async def read(self, url: str, param: str) -> bytes:
    """Returns what an http(s) URL has, following a few redirects; each is checked like the URL.

    `param` names the field of the request in errors.

    Raises: ApiError for a host that is not allowed or not public, an answer that is not 200, too
      many bytes or redirects, or no whole answer within `fetch_seconds`.
    """
    seconds = self._limits.fetch_seconds
    try:
      async with asyncio.timeout(seconds):
        return await self._follow(url, param)
    except RefusedAddressError:
      # The address stays unsaid: it would tell a client about the network behind the server.
      message = f"a picture's host has an address that is not public; {_DO}"
      raise ApiError("image_url_refused", message, param) from None
    except TimeoutError:
      message = f"a picture did not come within {seconds:g} s; {_DO}"
      raise ApiError("image_url_failed", message, param) from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
      message = f"a picture could not be fetched ({type(error).__name__}); {_DO}"
      raise ApiError("image_url_failed", message, param) from None

  async def _follow(self, text: str, param: str) -> bytes:
    url = self._checked(text, None, param)
    for _ in range(self._limits.fetch_redirects + 1):
      async with self._session.get(url, allow_redirects=False) as answer:
        if answer.status not in REDIRECTS:
          return await self._content(answer, param)
        url = self._checked(answer.headers.get("Location", ""), url, param)
    most = self._limits.fetch_redirects
    raise ApiError("image_url_failed", f"more than {most} redirects to a picture; {_DO}", param)

  def _checked(self, text: str, base: yarl.URL | None, param: str) -> yarl.URL:
    """Parses a URL as aiohttp will use it, and checks its scheme, host and port."""
    try:
      url = yarl.URL(text) if base is None else base.join(yarl.URL(text))
      host, port = (url.host or "").lower(), url.port
      address = addresses.literal(host)
    except ValueError:
      raise ApiError(
        "invalid_image_url", f"a picture's URL has no valid host; {_DO}", param
      ) from None
    if url.scheme not in PORTS or url.user is not None or url.password is not None:
      message = f"a picture's URL must be http(s), without a user; {_DO}"
      raise ApiError("invalid_image_url", message, param)
    if address is not None and not addresses.is_public(address):
      raise RefusedAddressError(host)
    names = {f"{host}:{port}"} | ({host} if port == PORTS[url.scheme] else set())
    if not names & self._hosts:
      message = f"pictures are not fetched from {host!r}, port {port}; {_DO}"
      raise ApiError("image_url_refused", message, param)
    return url

  async def _content(self, answer: aiohttp.ClientResponse, param: str) -> bytes:
    coding = answer.headers.get("Content-Encoding", "identity").lower()
    if answer.status != 200 or coding != "identity":
      found = f"status {answer.status}" if answer.status != 200 else f"encoding {coding!r}"
      raise ApiError("image_url_failed", f"a picture's host answered with {found}; {_DO}", param)
    most, content = self._limits.picture_bytes, bytearray()
    if (answer.content_length or 0) <= most:
      async for chunk in answer.content.iter_chunked(CHUNK):
        content += chunk
        if len(content) > most:
          break
      else:
        return bytes(content)
    message = f"a picture has more than {most:,} bytes; make it smaller"
    raise ApiError("image_too_large", message, param)
