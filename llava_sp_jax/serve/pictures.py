"""Reads the pictures of a request: inline as base64, or by URL from hosts that are allowed."""

from __future__ import annotations

import asyncio
import binascii
import io
import re
from collections.abc import Sequence

from llava_sp_jax.data import decode
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.fetching import Fetcher
from llava_sp_jax.serve.limits import Limits

SLICE = 1 << 20  # characters of base64 that are decoded at once; the event loop runs in between
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):")
_DATA = re.compile(r"data:([^;,]{0,99})(?:;[^;,]{1,99}){0,9}?;base64,", re.IGNORECASE)

# How files begin -> their format. Other formats of `decode.FORMATS` are not read from a network.
SIGNATURES: tuple[tuple[re.Pattern[bytes], str], ...] = (
  (re.compile(rb"\x89PNG\r\n\x1a\n"), "PNG"),
  (re.compile(rb"\xff\xd8\xff"), "JPEG"),
  (re.compile(rb"GIF8[79]a"), "GIF"),
  (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "WEBP"),
)
KNOWN = ", ".join(name for _, name in SIGNATURES)
SEND = "send it inline as 'data:image/png;base64,...'"


async def read(
  urls: Sequence[tuple[str, str]], limits: Limits, fetcher: Fetcher | None = None
) -> tuple[bytes, ...]:
  """Returns the encoded pictures of a request, in their order, each checked by its header.

  Args:
    urls: (URL or base64, name of the field that holds it) of each picture.
    limits: number, bytes (of each, and of all) and pixels.
    fetcher: reads http(s) URLs; None refuses them.

  Raises: ApiError for the first picture that cannot be used.
  """
  if len(urls) > limits.pictures:
    raise ApiError(
      "too_many",
      f"{len(urls)} pictures; at most {limits.pictures} are read: send fewer",
      "messages",
    )
  contents: list[bytes] = []
  total = 0
  for url, param in urls:
    contents.append(await _one(url, param, limits, fetcher))
    total += len(contents[-1])
    if total > limits.all_picture_bytes:
      raise ApiError(
        "image_too_large",
        f"the pictures up to this one have {total:,} bytes; at most {limits.all_picture_bytes:,} "
        "are read: send fewer or smaller ones",
        param,
      )
  return tuple(contents)


async def _one(url: str, param: str, limits: Limits, fetcher: Fetcher | None) -> bytes:
  scheme = _SCHEME.match(url)
  if scheme is None or scheme[1].lower() == "data":
    return await asyncio.to_thread(inline, url, param, limits)
  if scheme[1].lower() not in ("http", "https"):
    raise ApiError(
      "invalid_image_url", f"the scheme of a picture's URL is {scheme[1]!r}; {SEND}", param
    )
  if fetcher is None:
    raise ApiError("image_url_refused", f"this server fetches no pictures by URL; {SEND}", param)
  content = await fetcher.read(url, param)
  await asyncio.to_thread(check, content, param, limits)
  return content


def inline(url: str, param: str, limits: Limits) -> bytes:
  """Returns the picture that a `data:` URL or plain base64 holds, with its header checked.

  The announced media type must be an image's; the content decides which.

  Raises: ApiError for anything but strict base64 (RFC 4648, section 4) of such a picture.
  """
  start = 0
  if url[:5].lower() == "data:":
    head = _DATA.match(url)
    if head is None:
      raise ApiError("invalid_image_url", f"a 'data:' URL without base64 content; {SEND}", param)
    if not head[1].lower().startswith("image/"):
      raise ApiError("invalid_image", f"its media type is {head[1]!r}; {SEND}", param)
    start = head.end()
  if (len(url) - start) * 3 // 4 > limits.picture_bytes + 2:
    raise _too_large(f"about {(len(url) - start) * 3 // 4:,} bytes", param, limits)
  content = _base64(url, start, param)
  check(content, param, limits)
  return content


def _base64(text: str, start: int, param: str) -> bytes:
  end = len(text)
  if text.find("=", start, end - 2) >= 0:
    raise ApiError("invalid_base64", "'=' stands before the end of base64", param)
  try:
    return b"".join(
      binascii.a2b_base64(text[at : at + SLICE], strict_mode=True)
      for at in range(start, end, SLICE)
    )
  except ValueError as error:  # binascii.Error, or text that is not ASCII
    raise ApiError(
      "invalid_base64",
      f"a picture is not base64 ({error}); expected A-Z a-z 0-9 + / with padding, no line breaks, "
      "or a URL",
      param,
    ) from None


def check(content: bytes, param: str, limits: Limits) -> None:
  """Checks the size, the format and the pixels of an encoded picture; decodes its header alone.

  Raises: ApiError when it has more than `picture_bytes`, begins like none of SIGNATURES, or the
    square around it has more than `picture_pixels`.
  """
  if len(content) > limits.picture_bytes:
    raise _too_large(f"{len(content):,} bytes", param, limits)
  if not any(pattern.match(content) for pattern, _ in SIGNATURES):
    svg = re.search(rb"<svg", content[:1024], re.IGNORECASE)
    found = "an SVG drawing" if svg else "no picture, or damaged" if content else "empty"
    raise ApiError("invalid_image", f"a picture is {found}; known formats: {KNOWN}", param)
  try:
    width, height = decode.read_size(io.BytesIO(content), f"of {len(content):,} bytes")
  except SampleError as error:
    raise ApiError("invalid_image", str(error), param) from None
  if max(width, height) ** 2 > limits.picture_pixels:
    side = int(limits.picture_pixels**0.5)
    raise ApiError(
      "image_too_large",
      f"a picture has {width}x{height} pixels; at most {side}x{side} are read: make it smaller",
      param,
    )


def _too_large(found: str, param: str, limits: Limits) -> ApiError:
  return ApiError(
    "image_too_large",
    f"a picture has {found}; at most {limits.picture_bytes:,} are read: make it smaller",
    param,
  )
