"""Turns an image into tiles and a plan of their tokens, for training and inference alike.

With `anyres`, tile 0 shows the whole image, and the other tiles are squares cut out of a larger
copy of it. The decoder reads the tokens in LLaVA-SP's order: the spatial tokens of all tiles, the
patches of tile 0, the patches of the other tiles. This module computes that order, as indices.

Shape letters:  R,C rows and columns of tiles . g patches along a side of a tile
Source: `llava/mm_utils.py`, `prepare_inputs_labels_for_multimodal` in `llava/model/llava_arch.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import ConfigError, lookup
from llava_sp_jax.data import decode
from llava_sp_jax.data import image as image_lib
from llava_sp_jax.data.example import NEWLINE, TokenPlan

Size = tuple[int, int]  # width, height
Order = list[np.ndarray]  # indices of image tokens; their concatenation is what the decoder reads


@dataclasses.dataclass(frozen=True)
class Tile:
  """Describes the tokens of one tile: a square of pixels that the vision tower reads at once."""

  size: int  # pixels along a side
  grid: int  # patches along a side
  spatial: int = 0  # spatial tokens, which come before the patches
  newline: bool = False  # whether the model has a learned token for the end of a row of patches

  @property
  def tokens(self) -> int:
    """Returns the number of spatial and patch tokens of the tile, without the newline."""
    return self.spatial + self.grid * self.grid


@dataclasses.dataclass(frozen=True, eq=False)
class Picture:
  """Holds a preprocessed image: its tiles [M, size, size, 3] float32 and their token plan."""

  tiles: np.ndarray
  plan: TokenPlan


class Reader:
  """Preprocesses images into `Picture`s by the image settings of a `DataConfig`."""

  def __init__(self, data: config_lib.DataConfig, tile: Tile):
    """Checks the settings and prepares the preprocessing.

    Raises: ConfigError for settings that do not exist or do not fit the tile.
    """
    self._aspect = lookup("data.image_aspect", data.image_aspect, ASPECTS)
    lookup("data.image_fit", data.image_fit, image_lib.FITS)
    lookup("data.image_resample", data.image_resample, image_lib.RESAMPLES)
    lookup("data.patch_merge", data.patch_merge, MERGES)
    if data.patch_merge == "spatial_unpad" and not tile.newline:
      raise ConfigError("data.patch_merge: 'spatial_unpad' needs model.image_newline=true")
    odd = [
      p
      for p in data.grid_pinpoints
      if len(p) != 2 or min(p) < tile.size or any(side % tile.size for side in p)
    ]
    if data.image_aspect == "anyres" and (odd or not data.grid_pinpoints):
      raise ConfigError(
        f"data.grid_pinpoints: {odd or 'none'} given; anyres needs (width, height) pairs that are "
        f"multiples of model.tower.image_size, {tile.size}"
      )
    if data.image_aspect == "anyres" and data.augment != "none":
      raise ConfigError(f"data.augment: {data.augment!r} would move the tiles of one image apart")
    self.preprocess = image_lib.Preprocess(
      tile.size, data.image_mean, data.image_std, data.image_fit, data.image_resample
    )
    self.tile, self.pinpoints, self._merge = tile, data.grid_pinpoints, data.patch_merge
    areas = [w * h // tile.size**2 for w, h in self.pinpoints]
    self.max_tiles = 1 + max(areas) if data.image_aspect == "anyres" else 1

  def __call__(self, image: Image.Image) -> Picture:
    """Preprocesses an image. Raises: SampleError for a size that the settings cannot handle."""
    plan = self.plan(image.size)
    views = self._aspect.views(self, decode.rgb(image))
    return Picture(np.stack([self.preprocess.square(v) for v in views]), plan)

  def plan(self, size: Size) -> TokenPlan:
    """Returns the token plan of an image from its (width, height) alone, without decoding it.

    Raises: SampleError for a size that the settings cannot handle.
    """
    self._aspect.check(self, size)
    return plan(self.tile, size, self._aspect.canvas(self, size), self._merge)


@dataclasses.dataclass(frozen=True)
class Aspect:
  """Defines how an image becomes tiles.

  `views` returns one image for each tile. `check` raises SampleError for a size that cannot be
  handled. `canvas` returns the size that all tiles but tile 0 cover, or None for a single tile.
  """

  views: Callable[[Reader, Image.Image], list[Image.Image]]
  check: Callable[[Reader, Size], None]
  canvas: Callable[[Reader, Size], Size | None] = lambda reader, size: None


def _padded(reader: Reader, image: Image.Image) -> list[Image.Image]:
  return [image_lib.pad_to_square(image, reader.preprocess.pad_color)]


def _as_it_is(reader: Reader, image: Image.Image) -> list[Image.Image]:
  return [image]


def _tiled(reader: Reader, image: Image.Image) -> list[Image.Image]:
  size = reader.tile.size
  whole = image.resize((size, size), Image.Resampling.BICUBIC)
  return [whole, *cut(on_canvas(image, _canvas(reader, image.size)), size)]


def _canvas(reader: Reader, size: Size) -> Size:
  return best_resolution(size, reader.pinpoints)


def _check_fit(reader: Reader, size: Size) -> None:
  image_lib.FITS[reader.preprocess.fit].check(size)


# The values of the original's `image_aspect_ratio`. "square" leaves the work to the tower's own
# processor: CLIP crops a square from the center, SigLIP stretches.
ASPECTS = {
  "pad": Aspect(_padded, lambda reader, size: decode.check_size(size, padded=True)),
  "square": Aspect(_as_it_is, _check_fit),
  "anyres": Aspect(_tiled, lambda reader, size: None, _canvas),
}


def best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
  """Returns the one of `pinpoints` that keeps the most pixels of an image, of equals the smallest.

  `pinpoints` are sizes (width, height) of canvases.
  """

  def shown(canvas: Size) -> tuple[int, int]:
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    pixels = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
    return pixels, pixels - canvas[0] * canvas[1]

  return max(pinpoints, key=shown)


def on_canvas(image: Image.Image, resolution: Size) -> Image.Image:
  """Resizes an image to fit a canvas of size `resolution`, and centers it on black.

  Keeps its aspect ratio.
  """
  (width, height), (across, down) = resolution, image.size
  if width / across < height / down:
    size = (width, min(math.ceil(down * (width / across)), height))
  else:
    size = (min(math.ceil(across * (height / down)), width), height)
  canvas = Image.new("RGB", resolution, (0, 0, 0))
  resized = image.resize(size, Image.Resampling.BICUBIC)
  canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
  return canvas


def cut(image: Image.Image, size: int) -> list[Image.Image]:
  """Cuts an image into squares of `size` pixels and returns them row by row."""
  return [
    image.crop((left, top, left + size, top + size))
    for top in range(0, image.height, size)
    for left in range(0, image.width, size)
  ]


def unpad(grid: np.ndarray, size: Size) -> np.ndarray:
  """Removes from a canvas [H, W] the border that an image of `size` (width, height) leaves.

  Rounds the width of the border down, like the original, so up to one row or column of border
  remains. May leave nothing of an extremely long image, which only tile 0 shows then.
  """
  rows, columns = grid.shape
  if size[0] / size[1] > columns / rows:
    border = (rows - int(size[1] * (columns / size[0]))) // 2
    return grid[border : rows - border]
  border = (columns - int(size[0] * (rows / size[1]))) // 2
  return grid[:, border : columns - border]


def plan(tile: Tile, size: Size, resolution: Size | None, merge: str) -> TokenPlan:
  """Returns the order in which the decoder reads an image's tokens.

  Args:
    tile: the tokens of one tile.
    size: width and height of the original image, in pixels.
    resolution: width and height of the canvas that tiles 1, 2, ... cover; None for a single tile.
    merge: names a row of MERGES (the original's `mm_patch_merge_type`).
  """
  across, down = (side // tile.size for side in resolution or (0, 0))
  tiles = 1 + across * down
  slots = np.arange(tiles * tile.tokens, dtype=np.int32).reshape(tiles, tile.tokens)
  spatial, base = slots[:, : tile.spatial], slots[0, tile.spatial :]
  patches = slots[1:, tile.spatial :].reshape(down, across, tile.grid, tile.grid)
  order = MERGES[merge](spatial, base, patches, size)
  return TokenPlan(np.concatenate([part.reshape(-1) for part in order]), tiles, tile.tokens)


def _flat(spatial: np.ndarray, base: np.ndarray, patches: np.ndarray, size: Size) -> Order:
  """Orders tokens tile by tile: the spatial tokens of a tile, then its patches."""
  return [np.arange(spatial.size + base.size + patches.size, dtype=np.int32)]


def _spatial(spatial: np.ndarray, base: np.ndarray, patches: np.ndarray, size: Size) -> Order:
  """Orders tokens: all spatial tokens, patches of tile 0, rows of the canvas with its border."""
  return [spatial, base, patches.transpose(0, 2, 1, 3)]  # [R, g, C, g]


def _spatial_unpad(spatial: np.ndarray, base: np.ndarray, patches: np.ndarray, size: Size) -> Order:
  """Orders like `_spatial`, but without the border and with NEWLINE after every row of the canvas.

  Puts NEWLINE after tile 0 when it is the only tile.
  """
  if not patches.size:
    return [spatial, base, np.asarray([NEWLINE], np.int32)]
  down, across, side, _ = patches.shape
  canvas = patches.transpose(0, 2, 1, 3).reshape(down * side, across * side)
  rows = np.pad(unpad(canvas, size), ((0, 0), (0, 1)), constant_values=NEWLINE)
  return [spatial, base, rows]


MERGES = {"flat": _flat, "spatial": _spatial, "spatial_unpad": _spatial_unpad}
