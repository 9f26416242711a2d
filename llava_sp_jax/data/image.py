"""Preprocesses images, bit-equal to the original (with PIL, without torch).

The original guesses the channel axis from an array's shape, so it fails on an image one pixel high
and misreads one three pixels high. Here such images are treated like all others.
Source: `expand2square` in `llava/mm_utils.py`; Hugging Face's CLIP and SigLIP image processors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from PIL import Image

from llava_sp_jax.data import decode
from llava_sp_jax.data.failure import SampleError

LONGEST = 200  # the largest aspect ratio for "crop", which would enlarge a longer image past memory


@dataclasses.dataclass(frozen=True)
class Preprocess:
  """Preprocesses images as a vision tower expects.

  `size` is the side of the result in pixels, `mean` and `std` are of RGB values in [0, 1], `fit`
  names a row of FITS and `resample` one of RESAMPLES.
  """

  size: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  fit: str = "crop"
  resample: str = "bicubic"

  @property
  def pad_color(self) -> tuple[int, ...]:
    """Returns the mean color (R, G, B) as integers in [0, 255], with which squares are filled."""
    return tuple(int(m * 255) for m in self.mean)

  def __call__(self, image: Image.Image) -> np.ndarray:
    """Pads to a square with the mean color, resizes, normalizes. -> [size, size, 3] float32."""
    return self.square(pad_to_square(decode.rgb(image), self.pad_color))

  def square(self, image: Image.Image) -> np.ndarray:
    """Makes an RGB image square as `fit` says, and normalizes it. -> [size, size, 3] float32."""
    if image.size != (self.size, self.size):
      image = FITS[self.fit].make(image, self.size, RESAMPLES[self.resample])
    scaled = (np.asarray(image) * (1 / 255)).astype(np.float32)
    return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


# Resampling filters that a processor's settings may name; LLaVA's is bicubic, SigLIP 2's bilinear.
RESAMPLES = {kind.name.lower(): kind for kind in Image.Resampling}


def crop(
  image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
  """Resizes the shorter side to `size` and crops the longer one around its center (CLIP).

  Raises: SampleError for an aspect ratio above 200.
  """
  check_crop(image.size)
  short, long = sorted(image.size)
  enlarged = int(size * long / short)
  width, height = (size, enlarged) if image.width <= image.height else (enlarged, size)
  left, top = (width - size) // 2, (height - size) // 2
  image = image.resize((width, height), resample)
  return image.crop((left, top, left + size, top + size))


def check_crop(size: tuple[int, int]) -> None:
  """Raises SampleError for an aspect ratio above LONGEST (200); `size` is (width, height)."""
  if max(size) > LONGEST * min(size):
    raise SampleError(f"an image of {size[0]}x{size[1]} pixels is too long to be cropped")


def stretch(
  image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
  """Resizes both sides to `size`, regardless of the aspect ratio (SigLIP)."""
  return image.resize((size, size), resample)


@dataclasses.dataclass(frozen=True)
class Fit:
  """Defines how an image becomes a square.

  `make(image, size, filter)` returns one with sides of `size`. `check` raises SampleError for a
  (width, height) that `make` cannot handle.
  """

  make: Callable[[Image.Image, int, Image.Resampling], Image.Image]
  check: Callable[[tuple[int, int]], None] = lambda size: None


FITS = {"crop": Fit(crop, check_crop), "stretch": Fit(stretch)}


def pad_to_square(image: Image.Image, color: tuple[int, ...]) -> Image.Image:
  """Centers an image on a square that is as wide as its longer side, filled with `color`.

  Raises: SampleError if the square would have more pixels than are read of an image.
  """
  width, height = image.size
  if width == height:
    return image
  decode.check_size(image.size, padded=True)
  side = max(width, height)
  square = Image.new("RGB", (side, side), color)
  square.paste(image, ((side - width) // 2, (side - height) // 2))
  return square


def _no_change(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  return image


def _mirror_shift(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  reach = image.shape[0] // 8
  rows, columns = rng.integers(0, 2 * reach + 1, 2)
  padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
  image = padded[rows : rows + image.shape[0], columns : columns + image.shape[1]]
  return image[:, ::-1] if rng.integers(2) else image


# Mirroring suits only data without questions about left and right; LLaVA's recipe uses "none".
AUGMENTS = {"none": _no_change, "mirror_shift": _mirror_shift}
