"""Pictures' files: what is opened, which formats and modes, and how much memory they may take."""

from __future__ import annotations

import concurrent.futures
import io
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import anyres, decode
from llava_sp_jax.data.failure import REASON, SampleError
from tests.data.test_image import chunk, picture

GREY = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)


def png(width: int, height: int, depth: int = 8, color: int = 2, rows: bytes = b"") -> bytes:
  """A PNG with that head; without `rows` it is too short to be decoded."""
  head = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
  parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
  return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def read(data: bytes) -> np.ndarray:
  return np.asarray(decode.read(io.BytesIO(data), "of a test"))


def test_grey_of_16_bits_is_its_high_byte() -> None:
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in GREY)
  wanted = np.repeat((GREY >> 8).astype(np.uint8)[..., None], 3, -1)
  np.testing.assert_array_equal(read(png(16, 16, 16, 0, rows)), wanted)
  np.testing.assert_array_equal(read(encoded(Image.fromarray(GREY), "TIFF")), wanted)
  big = Image.frombytes("I;16B", (16, 16), GREY.astype(">u2").tobytes())
  np.testing.assert_array_equal(np.asarray(decode.rgb(big)), wanted)


def tiff(width: int, height: int, bits: int, photometric: int, pixels: bytes) -> bytes:
  """A grey TIFF, uncompressed, with only the tags that it needs."""
  tags = {
    256: width,
    257: height,
    258: bits,
    259: 1,
    262: photometric,
    273: 134,
    277: 1,
    278: height,
    279: len(pixels),
  }
  entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
  return b"II*\0" + struct.pack("<IH", 8, len(tags)) + (entries + bytes(124))[:124] + pixels


def test_grey_of_a_tiff_that_is_12_bits_or_where_0_is_white() -> None:
  """Pillow hands out the numbers as they are: 12 bits would be nearly black, the others a negative."""
  high = (GREY >> 8).astype(np.uint8)
  pairs = (GREY >> 4).reshape(-1, 2).astype(np.uint32)
  joined = pairs[:, 0] << 12 | pairs[:, 1]
  packed = b"".join(int(x).to_bytes(3, "big") for x in joined)
  found = read(tiff(16, 16, 12, 1, packed))
  np.testing.assert_array_equal(found, np.repeat(high[..., None], 3, -1))
  found = read(tiff(16, 16, 16, 0, GREY.astype("<u2").tobytes()))
  np.testing.assert_array_equal(found, 255 - np.repeat(high[..., None], 3, -1))


def test_colors_of_16_bits_are_their_high_bytes() -> None:
  values = np.stack([GREY, GREY[::-1], 65535 - GREY], -1)
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
  np.testing.assert_array_equal(read(png(16, 16, 16, 2, rows)), (values >> 8).astype(np.uint8))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_numbers_without_a_range_are_refused(mode: str) -> None:
  data = encoded(Image.new(mode, (4, 4)), "TIFF")
  with pytest.raises(SampleError, match=f"image of a test: a picture of mode '{mode}'; known: 1,"):
    read(data)


def test_transparency_is_dropped_and_orientation_not_applied() -> None:
  """As in the original; docs/data.md says so."""
  pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 4), np.uint8)
  np.testing.assert_array_equal(read(encoded(Image.fromarray(pixels), "PNG")), pixels[..., :3])
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees
  turned = encoded(Image.fromarray(pixels[..., :3]), "PNG", exif=exif)
  assert Image.open(io.BytesIO(turned)).getexif()[0x0112] == 6
  np.testing.assert_array_equal(read(turned), pixels[..., :3])


@pytest.mark.parametrize("kind", [*decode.FORMATS, "MPO"])
def test_every_format_of_the_table_is_read(kind: str) -> None:
  options = {"append_images": [picture(8, 8, 1)], "save_all": True} if kind == "MPO" else {}
  data = encoded(picture(8, 8), kind, **options)
  assert read(data).shape == (8, 8, 3)
  assert decode.read_size(io.BytesIO(data)) == (8, 8)
  np.testing.assert_array_equal(read(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["EPS", "PCX", "TGA", "ICO", "SGI"])
def test_other_formats_are_not(kind: str) -> None:
  data = encoded(picture(8, 8), kind)
  for function in (decode.read, decode.read_size):
    with pytest.raises(SampleError, match=r"cannot be decoded \(damaged, or none of JPEG, PNG, "):
      function(io.BytesIO(data))


@pytest.mark.parametrize("size", [(65000, 1), (1, 65000), (13378, 20)])
def test_the_square_around_a_picture_is_bounded(size: tuple[int, int], tmp_path: Path) -> None:
  """Refused by its head: the padded square of the first would take 16.9 GB."""
  rows = b"".join(b"\0" + bytes(3 * size[0]) for _ in range(size[1]))
  path = tmp_path / "thin.png"
  path.write_bytes(png(*size, rows=rows))
  padded = anyres.Reader(config_lib.DataConfig(), anyres.Tile(336, 24))
  with pytest.raises(SampleError, match=rf"{size[0]}x{size[1]} pixels, padded to [\d,]+; at most"):
    padded(decode.read(path))
  with pytest.raises(SampleError, match="padded to"):
    padded.plan(decode.read_size(path))
  stretched = config_lib.DataConfig(image_aspect="square", image_fit="stretch")
  assert anyres.Reader(stretched, anyres.Tile(8, 2))(decode.read(path)).tiles.shape == (1, 8, 8, 3)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_picture_without_pixels_is_none(size: tuple[int, int]) -> None:
  """Padded, it would be a square of the mean color."""
  reader = anyres.Reader(config_lib.DataConfig(), anyres.Tile(8, 2))
  with pytest.raises(SampleError, match=rf"a picture of {size[0]}x{size[1]} pixels; expected at"):
    reader(Image.new("RGB", size))
  with pytest.raises(SampleError, match="image of a test: cannot be decoded"):
    decode.read(io.BytesIO(png(*size)), "of a test")


@pytest.mark.parametrize("size", [(20000, 20000), (1 << 31 - 1, 1), (65535, 65535), (13378, 13378)])
def test_pixels_are_bounded_before_any_is_decoded(size: tuple[int, int]) -> None:
  for function in (decode.read, decode.read_size):
    with pytest.raises(SampleError, match=r"image of a test: "):
      function(io.BytesIO(png(*size)), "of a test")


def test_what_an_enormous_picture_may_do_is_bounded_over_all_threads(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Sixteen threads with pictures of which two fit: never more than two at a time."""
  monkeypatch.setattr(decode, "PIXEL_BUDGET", decode.PixelBudget(2 * 40 * 40))
  data, lock = encoded(picture(40, 30), "PNG"), threading.Lock()
  now, most = 0, 0

  def use(_: int) -> None:
    nonlocal now, most
    with decode.picture(io.BytesIO(data)) as pixels:
      with lock:
        now, most = now + 1, max(most, now + 1)
      threading.Event().wait(0.01)
      assert pixels.size == (40, 30)
      with lock:
        now -= 1

  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    list(pool.map(use, range(24)))
  assert most == 2


def test_one_picture_larger_than_the_budget_is_alone_in_it() -> None:
  budget = decode.PixelBudget(100)
  with budget.of((1000, 1)):
    thread = threading.Thread(target=lambda: budget.of((1, 1)).__enter__(), daemon=True)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
  thread.join(5)
  assert not thread.is_alive()


def pipe(path: Path) -> Path:
  os.mkfifo(path)
  return path


IRREGULAR: dict[str, tuple[Callable[[Path], Path], str]] = {
  "pipe": (lambda folder: pipe(folder / "pipe.png"), "not a regular file"),
  "device": (lambda folder: Path("/dev/zero"), "not a regular file"),
  "folder": (lambda folder: folder, "not a regular file"),
  "missing": (lambda folder: folder / "gone.png", "no such file"),
  "below a file": (lambda folder: Path(__file__) / "x.png", "no such file"),
  "a long name": (lambda folder: folder / ("a" * 256), r"cannot be opened \(File name too long\)"),
  "a long path": (lambda folder: folder / ("a/" * 3000), r"cannot be opened \(File name too long\)"),
  "a zero": (lambda folder: folder / "a\0b.png", r"cannot be decoded \(ValueError: .*embedded null"),
  "half a pair": (lambda folder: folder / "\ud83d.png", r"\\ud83d.png: cannot be decoded \(Unicode"),
}  # fmt: skip


@pytest.mark.parametrize("kind", IRREGULAR)
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
  make, message = IRREGULAR[kind]
  path = make(tmp_path)
  for function in (decode.read, decode.read_size, decode.read_bytes):
    with pytest.raises(SampleError, match=message) as raised:
      function(path)
    assert len(str(raised.value)) <= REASON


def test_files_larger_than_any_picture_are_not_read(tmp_path: Path) -> None:
  path = tmp_path / "large.webp"
  with path.open("wb") as file:
    file.write(b"RIFF\0\0\0\0WEBPVP8 ")
    file.truncate(decode.MAX_BYTES + 1)
  with pytest.raises(SampleError, match=r"a file of 1,073,741,825 bytes; at most"):
    decode.read_size(path)


def palette_with_alpha() -> bytes:
  return encoded(picture(20, 30).convert("P"), "PNG", transparency=bytes(range(256)))


def torn_exif() -> bytes:
  """A directory that promises more entries than there are."""
  data = encoded(picture(20, 30), "JPEG")
  exif = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03\0\0"
  return data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:]


WARNED = {
  "a palette with alpha": (palette_with_alpha, r"Palette images with Transparency"),
  "torn Exif": (torn_exif, r"Corrupt EXIF data"),
  "large": (lambda: encoded(picture(12, 12), "PNG"), r"could be decompression bomb"),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_pillow_only_warns_of_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
  """Where warnings are errors, as here, and to the same pixels where they are not."""
  make, message = WARNED[name]
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700 if name != "large" else 100)
  data = make()
  found = read(data)
  with pytest.warns(
    UserWarning if name != "large" else Image.DecompressionBombWarning, match=message
  ):
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
  np.testing.assert_array_equal(found, wanted)
  with pytest.raises(UserWarning, match="as before"):  # the filters are those of before
    warnings.warn("as before", UserWarning, stacklevel=1)
