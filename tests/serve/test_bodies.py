"""Bodies of requests, as they arrive."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping

import pytest

from llava_sp_jax.serve import bodies
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.limits import DEFAULT, Limits

LIMITS = dataclasses.replace(DEFAULT, body_bytes=1000, body_seconds=0.05)
JSON = {"content-type": "application/json"}
taken = 0


async def whole() -> AsyncIterator[bytes]:
  for _ in range(10):
    yield b"x" * 100


async def endless() -> AsyncIterator[bytes]:
  global taken
  while True:
    taken += 1
    yield b"x" * 100


async def dripping() -> AsyncIterator[bytes]:
  while True:
    await asyncio.sleep(0.01)
    yield b"x"


async def never() -> AsyncIterator[bytes]:
  raise AssertionError("the body is read")
  yield b""


def read(chunks: Callable[[], AsyncIterator[bytes]], headers: Mapping[str, str]) -> bytes:
  return asyncio.run(bodies.read(chunks(), headers, LIMITS, lambda count: None))


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_a_body_within_the_limits(kind: str) -> None:
  assert read(whole, {"content-type": kind, "content-length": "1000"}) == b"x" * 1000


@pytest.mark.parametrize(
  ("chunks", "headers", "code", "says"),
  [
    (never, JSON | {"content-length": "1001"}, "request_too_large", "1001 bytes; at most 1,000"),
    (never, JSON | {"content-length": str(10 << 30)}, "request_too_large", "at most 1,000"),
    (never, JSON | {"content-length": "9" * 10**6}, "request_too_large", "at most 1,000"),
    (endless, JSON, "request_too_large", "more; at most 1,000 bytes"),
    (endless, JSON | {"content-length": "5"}, "request_too_large", "at most 1,000 bytes"),
    (dripping, JSON, "request_timeout", "after 0.05 s"),
    (never, {}, "unsupported_media_type", "'missing'; send JSON"),
    (never, {"content-type": "text/plain"}, "unsupported_media_type", "'text/plain'"),
    (never, {"content-type": "multipart/form-data; boundary=x"}, "unsupported_media_type", "send"),
    (never, JSON | {"content-encoding": "gzip"}, "unsupported_media_type", "'gzip'; send the body"),
  ],
)
def test_refused_bodies(
  chunks: Callable[[], AsyncIterator[bytes]], headers: dict[str, str], code: str, says: str
) -> None:
  global taken
  taken = 0
  with pytest.raises(ApiError) as caught:
    read(chunks, headers)
  assert (caught.value.code, says in str(caught.value)) == (code, True), caught.value
  assert 400 <= caught.value.status < 500
  assert taken <= 11


@pytest.mark.parametrize(
  ("name", "value"), [("pictures", 0), ("body_seconds", float("inf")), ("fetch_redirects", -1)]
)
def test_limits_are_numbers_above_zero(name: str, value: float) -> None:
  with pytest.raises(ValueError, match=f"limit {name}: expected a number above 0, found"):
    dataclasses.replace(DEFAULT, **{name: value})
  assert Limits(fetch_redirects=0).fetch_redirects == 0
