"""Configures LLaVA-SP for transformers, and plans in which order the decoder reads image tokens.

An image is one tile, or (anyres) tile 0 that shows all of it and further tiles of a larger canvas. A
tile becomes spatial tokens and one token for each patch.

Shape letters:  R,C rows and columns of tiles . g patches along a side of a tile
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

NEWLINE = -1  # in an order of tokens: the learned token at the end of a row of patches

Order = list[np.ndarray]  # indices of tokens; their concatenation is what the decoder reads
Size = tuple[int, int]  # height, width in pixels


class LlavaSPConfig(PretrainedConfig):
  """Holds the sizes of the vision tower, the projector and the decoder, and how tokens are ordered.

  `projector` is the row of the variant: which views of the grid become spatial tokens and how.
  """

  model_type = "llava_sp"
  sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012
  has_no_defaults_at_init = False

  def __init__(
    self,
    text_config: Any = None,
    vision_config: Any = None,
    projector: dict[str, Any] | None = None,
    num_spatial_tokens: int = 0,
    image_newline: bool = False,
    image_aspect_ratio: str = "pad",
    image_grid_pinpoints: Sequence[Sequence[int]] = (),
    patch_merge_type: str = "flat",
    image_token_id: int = 0,
    tie_word_embeddings: bool = False,
    **kwargs: Any,
  ):
    """Takes the groups of a config.json.

    Args:
      text_config, vision_config: groups of the decoder and the tower, or their configs.
      projector: the row of the projector's variant; None is the plain MLP of LLaVA-1.5.
      num_spatial_tokens: of one tile.
      image_newline: whether the model has a token that ends a row of patches.
      image_aspect_ratio: "pad" or "square" for one tile, "anyres" for several.
      image_grid_pinpoints: canvases of anyres, (height, width) in pixels.
      patch_merge_type: a row of MERGES.
      image_token_id: the id that stands for one image token in a prompt.
      tie_word_embeddings: whether the output layer is the embedding.
    """
    self.text_config = _group(text_config, "llama")
    self.vision_config = _group(vision_config, "clip_vision_model")
    self.projector = {**PLAIN, **(projector or {})}
    self.num_spatial_tokens = num_spatial_tokens
    self.image_newline = image_newline
    self.image_aspect_ratio = image_aspect_ratio
    self.image_grid_pinpoints = [list(pair) for pair in image_grid_pinpoints]
    self.patch_merge_type = patch_merge_type
    self.image_token_id = image_token_id
    super().__init__(**kwargs)
    self.tie_word_embeddings = tie_word_embeddings


# The plain MLP. With `views`, each of them gives one token for each of `scales` (sides in patches).
# A detail kernel has a name, a side in patches, and the name of the kernel whose values it averages.
PLAIN: dict[str, Any] = {
  "variant": "none",
  "views": [],
  "scales": [],
  "extractor": "conv",
  "token_width": 512,
  "out_bias": False,
  "detail_kernels": [],
  "detail_sizes": [],
  "detail_values": [],
  "detail_field": 0,
  "detail_stride": 2,
  "detail_merge": "concat",
  "detail_as_tokens": False,
}


def _group(given: Any, default: str) -> Any:
  if isinstance(given, PretrainedConfig):
    return given
  values = dict(given or {})
  return CONFIG_MAPPING[values.pop("model_type", default)](**values)


def token_order(
  size: Size, tile: int, grid: int, spatial: int, pinpoints: Sequence[Sequence[int]], merge: str
) -> tuple[np.ndarray, int]:
  """Returns the order in which the decoder reads an image's tokens, and its number of tiles.

  Args:
    size: height and width of the image, in pixels.
    tile: pixels along a side of a tile.
    grid: patches along a side of a tile.
    spatial: spatial tokens of a tile, which come before its patches.
    pinpoints: canvases of anyres, (height, width); empty for a single tile.
    merge: a row of MERGES.
  """
  height, width = best_canvas(size, pinpoints) if pinpoints else (0, 0)
  down, across = height // tile, width // tile
  tiles, each = 1 + down * across, spatial + grid * grid
  slots = np.arange(tiles * each).reshape(tiles, each)
  patches = slots[1:, spatial:].reshape(down, across, grid, grid)
  parts = MERGES[merge](slots[:, :spatial], slots[0, spatial:], patches, size)
  return np.concatenate([part.reshape(-1) for part in parts]), tiles


def best_canvas(size: Size, pinpoints: Sequence[Sequence[int]]) -> Size:
  """Returns the canvas that keeps the most pixels of an image, of equals the smallest."""

  def kept(canvas: Sequence[int]) -> tuple[int, int]:
    scale = min(canvas[1] / size[1], canvas[0] / size[0])
    pixels = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
    return pixels, pixels - canvas[0] * canvas[1]

  height, width = max(pinpoints, key=kept)
  return height, width


def _flat(spatial: np.ndarray, base: np.ndarray, patches: np.ndarray, size: Size) -> Order:
  return [np.arange(spatial.size + base.size + patches.size)]


def _spatial(spatial: np.ndarray, base: np.ndarray, patches: np.ndarray, size: Size) -> Order:
  return [spatial, base, patches.transpose(0, 2, 1, 3)]  # [R, g, C, g]


def _spatial_unpad(spatial: np.ndarray, base: np.ndarray, patches: np.ndarray, size: Size) -> Order:
  if not patches.size:
    return [spatial, base, np.asarray([NEWLINE])]
  rows, columns, side, _ = patches.shape
  canvas = patches.transpose(0, 2, 1, 3).reshape(rows * side, columns * side)
  seen = _unpad(canvas, size)
  return [spatial, base, np.pad(seen, ((0, 0), (0, 1)), constant_values=NEWLINE)]


def _unpad(canvas: np.ndarray, size: Size) -> np.ndarray:
  """Removes the border that an image leaves on a canvas of patches."""
  (rows, columns), (height, width) = canvas.shape, size
  if width / height > columns / rows:
    border = (rows - int(height * (columns / width))) // 2
    return canvas[border : rows - border]
  border = (columns - int(width * (rows / height))) // 2
  return canvas[:, border : columns - border]


# How the tokens of an image's tiles are ordered: flat, or all spatial tokens, tile 0, the canvas.
MERGES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, Size], Order]] = {
  "flat": _flat,
  "spatial": _spatial,
  "spatial_unpad": _spatial_unpad,
}
