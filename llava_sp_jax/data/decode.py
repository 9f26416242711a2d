"""Decodes image files to RGB, within bounds on the kind of file, its format and its size.

A data set or a user names the files, so none is trusted: only regular files and the formats of a
table are read, the size is checked before a pixel is decoded, and `PIXEL_BUDGET` bounds the pixels
in memory. Exif orientation is ignored and transparency is dropped, as in the original, which opens
every image with `convert("RGB")`.
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

# Pillow's decoders that are used for untrusted files; JPEG includes multi-picture files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 178_956_970  # of an image, and of the square that it is padded to
MAX_BYTES = 1 << 30  # of a file; an uncompressed image of MAX_PIXELS has fewer
_WARNINGS = threading.Lock()  # warning filters are shared by all threads
T = TypeVar("T")
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of a TIFF


class MissingImageError(SampleError):
  """Reports that an image file does not exist."""


class PixelBudget:
  """Bounds how many pixels all threads of a process hold at the same time, to `pixels`."""

  def __init__(self, pixels: int):
    self._all = self._free = pixels
    self._changed = threading.Condition()

  @contextlib.contextmanager
  def of(self, size: tuple[int, int]) -> Iterator[None]:
    """Reserves the pixels of an image padded to a square for a block; waits until they are free.

    `size` is (width, height) of the image.
    """
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


PIXEL_BUDGET = PixelBudget(2 * MAX_PIXELS)


def _converted(image: Image.Image) -> Image.Image:
  return image.convert("RGB")


def _as_it_is(image: Image.Image) -> Image.Image:
  image.load()
  return image


def _high_byte(image: Image.Image) -> Image.Image:
  """Reduces gray values of up to 16 bits to their highest 8 bits, as Pillow reads 16-bit colors.

  Reads two tags of TIFF files that Pillow ignores beyond 8 bits: the bits per sample (e.g. 12 of
  16), and whether 0 is white.
  """
  tags = getattr(image, "tag_v2", {})
  bits, white_is_zero = tags.get(BITS_PER_SAMPLE, (16,))[0], tags.get(PHOTOMETRIC) == 0
  values = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
  return Image.fromarray(255 - values if white_is_zero else values).convert("RGB")


# Pillow's mode -> conversion to RGB. 32-bit modes are missing: the range of their values is
# unknown.
MODES: dict[str, Callable[[Image.Image], Image.Image]] = {
  **dict.fromkeys(("1", "L", "P", "LA", "La", "PA"), _converted),
  **dict.fromkeys(("RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"), _converted),
  **dict.fromkeys(("I;16", "I;16L", "I;16B", "I;16N"), _high_byte),
  "RGB": _as_it_is,
}


def rgb(image: Image.Image) -> Image.Image:
  """Converts an image to RGB, 8 bits a channel.

  Raises: SampleError for a mode of Pillow that is not in MODES, such as 32-bit values.
  """
  if image.mode not in MODES:
    raise SampleError(f"a picture of mode {image.mode!r}; known: {', '.join(MODES)}")
  return _unwarned(lambda: MODES[image.mode](image))


def _unwarned(make: Callable[[], T]) -> T:
  """Calls `make`, and again with warnings ignored if a warning was raised as an error.

  So a warning of Pillow costs no image in a process that turns warnings into errors.
  """
  try:
    return make()
  except Warning:
    with _WARNINGS, warnings.catch_warnings():
      warnings.simplefilter("ignore")
      return make()


def check_size(size: tuple[int, int], padded: bool = False) -> None:
  """Checks the pixels of an image of (width, height), or of the square around it if `padded`.

  Raises: SampleError when there are none, or more than MAX_PIXELS (about 179 million).
  """
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
  """Decodes a file to RGB; errors name it `name`, or its path if `name` is empty.

  Raises:
    MissingImageError: when the file does not exist.
    SampleError: when it is not an image that can be decoded within the bounds.
  """
  with picture(file, name) as image:
    return image


@contextlib.contextmanager
def picture(file: str | Path | BinaryIO, name: str = "") -> Iterator[Image.Image]:
  """Decodes a file to RGB for the length of a block, within `PIXEL_BUDGET`.

  Errors name the file `name`, or its path if `name` is empty.

  Raises: SampleError when the file cannot be decoded; it also replaces any error that the block
    raises.
  """
  with _named(file, name), _opened(file) as image, PIXEL_BUDGET.of(image.size):
    yield rgb(image)


def read_size(file: str | Path | BinaryIO, name: str = "") -> tuple[int, int]:
  """Reads (width, height) in pixels from the header of a file, which errors call `name` if given.

  Raises: MissingImageError when the file does not exist; SampleError when it is no image, or too
    large.
  """
  with _named(file, name), _opened(file) as image:
    return image.size


def read_bytes(path: str | Path) -> bytes:
  """Returns the content of an image file without decoding it.

  Raises: MissingImageError when the file does not exist; SampleError when it cannot be opened, or
    has more than MAX_BYTES (1 GiB).
  """
  with _named(path, ""), _regular(path) as file:
    return file.read(MAX_BYTES)


@contextlib.contextmanager
def _named(file: str | Path | BinaryIO, name: str) -> Iterator[None]:
  """Turns any exception of a block into a SampleError whose message starts with the file's name."""
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
  """Opens a regular file of at most MAX_BYTES; refuses pipes and devices without blocking.

  Raises: MissingImageError when there is none; SampleError when it cannot be opened or is too
    large.
  """
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
