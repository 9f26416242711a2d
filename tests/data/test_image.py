"""Preprocessing against its definition, and clear errors for what is no image."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_sp_jax.data import decode, image
from llava_sp_jax.data.failure import SampleError

MEAN, STD = (0.5, 0.25, 0.125), (0.5, 0.25, 0.2)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_a_picture_of_the_right_size_is_only_normalized() -> None:
  source = picture(8, 8)
  result = image.Preprocess(8, MEAN, STD)(source)
  assert result.dtype == np.float32
  wanted = (np.asarray(source, np.float64) / 255 - MEAN) / STD
  np.testing.assert_allclose(result, wanted, atol=1e-6)


@pytest.mark.parametrize(("width", "height", "box"), [(9, 4, (0, 2, 9, 6)), (3, 8, (2, 0, 5, 8))])
def test_padding_centers_on_the_mean_color(width: int, height: int, box: tuple) -> None:
  square = image.pad_to_square(picture(width, height), (127, 63, 31))
  side = max(width, height)
  assert square.size == (side, side)
  np.testing.assert_array_equal(square.crop(box), picture(width, height))
  outside = np.ones((side, side), bool)
  outside[box[1] : box[3], box[0] : box[2]] = False
  assert (np.asarray(square)[outside] == (127, 63, 31)).all()


def test_padding_becomes_nearly_zero() -> None:
  """The padding has the mean colour, cut to whole numbers, so its normalised value is below a step."""
  result = image.Preprocess(8, MEAN, STD)(picture(8, 2))
  assert np.abs(result[0]).max() < 1 / 255 / min(STD)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_every_mode_becomes_three_channels(mode: str) -> None:
  assert image.Preprocess(6, MEAN, STD)(picture(6, 6).convert(mode)).shape == (6, 6, 3)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
  with pytest.raises(SampleError, match=r"image .*gone.png: no such file"):
    decode.read(tmp_path / "gone.png")


def chunk(kind: bytes, content: bytes) -> bytes:
  """One chunk of a PNG."""
  check = zlib.crc32(kind + content)
  return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


# What becomes of a PNG that is whole, up to its first chunk (33 bytes) and behind it.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
  "text": lambda _: b"hello",
  "truncated": lambda whole: whole[:900],
  "empty": lambda _: b"",
  "short header": lambda whole: whole[:8] + chunk(b"IHDR", b"12345") + whole[33:],
  "short density": lambda whole: whole[:33] + chunk(b"pHYs", b"12") + whole[33:],
  "bomb of text": lambda whole: (
    whole[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 21))) + whole[33:]
  ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_broken_file_is_named(tmp_path: Path, kind: str) -> None:
  path = tmp_path / "broken.png"
  picture(40, 40).save(path)
  path.write_bytes(DAMAGES[kind](path.read_bytes()))
  with pytest.raises(SampleError, match=r"image .*broken.png: cannot be decoded"):
    decode.read(path)


def test_a_folder_is_not_an_image(tmp_path: Path) -> None:
  with pytest.raises(SampleError, match="not a regular file"):
    decode.read(tmp_path)


def test_mirror_shift_keeps_the_shape_and_only_moves_pixels() -> None:
  source = np.arange(16 * 16 * 3, dtype=np.float32).reshape(16, 16, 3)
  rng = np.random.default_rng(0)
  results = [image.AUGMENTS["mirror_shift"](source, rng) for _ in range(12)]
  assert all(r.shape == source.shape and np.isin(r, source).all() for r in results)
  assert len({r.tobytes() for r in results}) > 6
  np.testing.assert_array_equal(image.AUGMENTS["none"](source, rng), source)
