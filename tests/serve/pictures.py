"""Pictures that clients send, good and bad, and how they are sent."""

from __future__ import annotations

import base64
import io
import struct
import zlib

from PIL import Image


def encoded(kind: str = "PNG", size: tuple[int, int] = (6, 4)) -> bytes:
  """A small picture in a format of Pillow."""
  file = io.BytesIO()
  Image.new("RGB", size, (200, 30, 60)).save(file, kind)
  return file.getvalue()


def data_url(content: bytes, media: str = "image/png") -> str:
  return f"data:{media};base64,{base64.b64encode(content).decode()}"


def png_of(width: int, height: int, content: bytes = b"") -> bytes:
  """A PNG whose header claims any size; `content` is what it holds, before compression."""

  def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(content))
    + chunk(b"IEND", b"")
  )


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><use x="file:///etc/x"/></svg>'
