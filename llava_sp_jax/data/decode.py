"""From a picture's file to its pixels, within bounds: which files, which formats, how large.

A picture is what a data set or a user names, so its file is opened as a stranger's: regular files
only, formats of a table, sizes from the head before a pixel is decoded, and never more pixels at
once than `ROOM` has. Exif orientation is not applied and transparency is dropped, as in the
original, which opens every picture with `convert("RGB")`.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from llava_sp_jax.data.failure import SampleError, reason

# Pillow's decoders that may read a stranger's file; JPEG stands for multi-picture files as well.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 178_956_970  # of a picture, and of the square that it is padded to
MAX_BYTES = 1 << 30  # of a file; the largest picture is smaller, uncompressed
_WARNINGS = threading.Lock()  # their filters belong to the process
T = TypeVar("T")
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of a TIFF


class MissingImageError(SampleError):
  """There is no file of that name."""


class Room:
  """Pixels that may be in memory at a time, over all threads of a process."""

  def __init__(self, pixels: int):
    self._all = self._free = pixels
    self._changed = threading.Condition()

  @contextlib.contextmanager
  def of(self, size: tuple[int, int]) -> Iterator[None]:
    """Waits for the room of a picture with the square around it."""
    pixels = min(max(size) ** 2, self._all)
    with self._changed:
      self._changed.wait_for(lambda: pixels <= self._free)
      self._free -= pixels
    try:
      yield
    finally:
      with self._changed:
        self._free += pixels
        self._changed.notify_all()


ROOM = Room(2 * MAX_PIXELS)


def _converted(image: Image.Image) -> Image.Image:
  return image.convert("RGB")


def _as_it_is(image: Image.Image) -> Image.Image:
  image.load()
  return image


def _high_byte(image: Image.Image) -> Image.Image:
  """Grey of up to 16 bits: its highest 8, as Pillow itself reads colours of 16 bits.

  What a TIFF says of its numbers is Pillow's to honour only for 8 bits: how many count (12 of 16),
  and whether 0 is white.
  """
  tags = getattr(image, "tag_v2", {})
  bits, white_is_zero = tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(PHOTOMETRIC) == 0
  values = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
  return Image.fromarray(255 - values if white_is_zero else values).convert("RGB")


# Pillow's mode -> how it becomes RGB. Numbers of 32 bits have no range that could be known.
MODES: dict[str, Callable[[Image.Image], Image.Image]] = {
  **dict.fromkeys(("1", "L", "P", "LA", "La", "PA"), _converted),
  **dict.fromkeys(("RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"), _converted),
  **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), _high_byte),
  "RGB": _as_it_is,
}


def rgb(image: Image.Image) -> Image.Image:
  """A picture in 3 x 8 bits. Raises: SampleError for a mode that is in no row of MODES."""
  if image.mode not in MODES:
    raise SampleError(f"a picture of mode {image.mode!r}; known: {', '.join(MODES)}")
  return _unwarned(lambda: MODES[image.mode](image))


def _unwarned(make: Callable[[], T]) -> T:
  """What `make` returns; what Pillow only warns of costs no picture where warnings are errors."""
  try:
    return make()
  except Warning:
    with _WARNINGS, warnings.catch_warnings():
      warnings.simplefilter("ignore")
      return make()


def check_size(size: tuple[int, int], padded: bool = False) -> None:
  """Raises: SampleError when a picture has no pixels, or with the square around it too many."""
  width, height = size
  pixels = max(size) ** 2 if padded else width * height
  if min(size) < 1:
    raise SampleError(f"a picture of {width}x{height} pixels; expected at least one")
  if pixels > MAX_PIXELS:
    around = f", padded to {pixels:,}" if padded else ""
    raise SampleError(
      f"a picture of {width}x{height} pixels{around}; at most {MAX_PIXELS:,} are read"
    )


def read(file: str | Path | BinaryIO, name: str = "") -> Image.Image:
  """Decodes a file to RGB; messages call it `name` (its path if empty).

  Raises:
    SampleError: names the file and says whether it is missing or not a picture that is read.
  """
  with picture(file, name) as image:
    return image


@contextlib.contextmanager
def picture(file: str | Path | BinaryIO, name: str = "") -> Iterator[Image.Image]:
  """The RGB pixels of a file; until the block ends, they have their place in `ROOM`.

  Raises: SampleError like `read`; it names the file for what is raised in the block as well.
  """
  with _named(file, name), _opened(file) as image, ROOM.of(image.size):
    yield rgb(image)


def read_size(file: str | Path | BinaryIO, name: str = "") -> tuple[int, int]:
  """Width and height in pixels, from the head of a file. Raises: SampleError like `read`."""
  with _named(file, name), _opened(file) as image:
    return image.size


def read_bytes(path: str | Path) -> bytes:
  """The bytes of a picture's file, whatever they are. Raises: SampleError like `read`."""
  with _named(path, ""), _regular(path) as file:
    return file.read(MAX_BYTES)


@contextlib.contextmanager
def _named(file: str | Path | BinaryIO, name: str) -> Iterator[None]:
  """Puts the file's name before whatever Pillow or the system raises: that can be nearly anything."""
  name = name or str(file)
  try:
    yield
  except SampleError as error:
    raise type(error)(f"image {name}: {error}") from None
  except UnidentifiedImageError:
    known = ", ".join(FORMATS)
    raise SampleError(f"image {name}: cannot be decoded (damaged, or none of {known})") from None
  except Exception as error:
    raise SampleError(f"image {name}: cannot be decoded ({reason(error)})") from None


@contextlib.contextmanager
def _opened(file: str | Path | BinaryIO) -> Iterator[Image.Image]:
  with contextlib.ExitStack() as stack:
    given = stack.enter_context(_regular(file)) if isinstance(file, str | Path) else file
    image = stack.enter_context(_unwarned(lambda: Image.open(given, formats=FORMATS)))
    check_size(image.size)
    yield image


def _regular(path: str | Path) -> io.BufferedReader:
  """Opens a regular file of a bounded size; a pipe or a device is refused, and not waited for."""
  try:
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
  except OSError as error:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
      raise MissingImageError("no such file") from None
    raise SampleError(f"cannot be opened ({os.strerror(error.errno or 0)})") from None
  about = os.fstat(handle)
  problem = ""
  if not stat.S_ISREG(about.st_mode):
    problem = "not a regular file"
  elif about.st_size > MAX_BYTES:
    problem = f"a file of {about.st_size:,} bytes; at most {MAX_BYTES:,} are read"
  if problem:
    os.close(handle)
    raise SampleError(problem)
  return os.fdopen(handle, "rb")
