"""Reads the body of a request from the network, within the limits of bytes and time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterable, Callable, Iterator, Mapping

from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.limits import Limits

Take = Callable[[int], None]  # is told the number of bytes that are about to be held


class Budget:
  """Bounds the bytes of all bodies that a server holds at the same time."""

  def __init__(self, most: int):
    self._most, self.held = most, 0

  @contextlib.contextmanager
  def share(self) -> Iterator[Take]:
    """Yields a function that takes bytes; they are given back at the end of the block.

    The function raises ApiError (429) when too many are held.
    """
    mine = 0

    def take(count: int) -> None:
      nonlocal mine
      if self.held + count > self._most:
        raise ApiError(
          "too_many_requests",
          f"requests of {self.held:,} bytes are being read or answered; at most {self._most:,} "
          "are held: ask again later",
        )
      mine, self.held = mine + count, self.held + count

    try:
      yield take
    finally:
      self.held -= mine


async def read(
  chunks: AsyncIterable[bytes], headers: Mapping[str, str], limits: Limits, take: Take
) -> bytes:
  """Returns the JSON body of a request.

  Args:
    chunks: the parts of the body, as they arrive.
    headers: of the request, by names in lower case.
    limits: `body_bytes` and `body_seconds` hold here.
    take: is told of the bytes before they are read, and may raise ApiError.

  Raises: ApiError for a body that is too large (before it is read, if its length is announced), too
    slow, compressed, or not announced as JSON.
  """
  kind = headers.get("content-type", "").partition(";")[0].strip().lower()
  if kind != "application/json":
    raise ApiError(
      "unsupported_media_type",
      f"Content-Type is {kind or 'missing'!r}; send JSON as 'application/json'",
    )
  coding = headers.get("content-encoding", "identity").strip().lower()
  if coding != "identity":
    raise ApiError(
      "unsupported_media_type", f"Content-Encoding is {coding!r}; send the body as it is"
    )
  announced = headers.get("content-length", "0")
  # Digits are counted first: converting many of them takes time.
  if len(announced) > 18 or (announced.isdecimal() and int(announced) > limits.body_bytes):
    raise _too_large(f"{announced[:18]} bytes", limits)
  body = bytearray()
  try:
    async with asyncio.timeout(limits.body_seconds):
      async for chunk in chunks:
        if len(body) + len(chunk) > limits.body_bytes:
          raise _too_large("more", limits)
        take(len(chunk))
        body += chunk
  except TimeoutError:
    raise ApiError(
      "request_timeout",
      f"after {limits.body_seconds:g} s, {len(body):,} bytes of the body had come; send it faster",
    ) from None
  return bytes(body)


def _too_large(found: str, limits: Limits) -> ApiError:
  return ApiError(
    "request_too_large",
    f"the body has {found}; at most {limits.body_bytes:,} bytes are read: send fewer or smaller "
    "pictures",
  )
