"""Describes what each spatial token sees, for the page that draws it over a picture."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.data.image import Preprocess
from llava_sp_jax.models import build
from llava_sp_jax.models.projector import VARIANTS
from llava_sp_jax.models.spatial import DETAIL_STRIDE, VIEWS, detail_size

# (data.image_aspect, data.image_fit) -> how a picture becomes the square that the vision tower
# reads: padded, cropped around its center, or squashed. Of anyres, this is the first tile.
RESIZES = {
  ("pad", "crop"): "pad",
  ("pad", "stretch"): "pad",
  ("square", "crop"): "crop",
  ("square", "stretch"): "squash",
  ("anyres", "crop"): "squash",
  ("anyres", "stretch"): "squash",
}
DETAIL = "detail"  # the kind of a token that is one position of a strided convolution

Bins = tuple[tuple[int, int], ...]  # (first patch, patch after the last) of each row or column


@dataclasses.dataclass(frozen=True)
class SeenView:
  """Describes what one spatial token sees of the patch grid.

  `kind` is a row of VIEWS, or DETAIL; `size` is its side. Each of its values is the mean over the
  patches in a bin of `rows` and one of `columns`; there are no bins for a token that sees nothing.
  `says` tells a reader the same.
  """

  kind: str
  size: int
  rows: Bins
  columns: Bins
  says: str = ""


@dataclasses.dataclass(frozen=True)
class ModelPage:
  """Describes a model for the page.

  `tokens` counts those of one tile: one for each of `views`, then one for each patch. `pad_color`
  (R, G, B) fills what a padded picture leaves free.
  """

  model: str
  variant: str
  grid: int  # patches along a side
  image_size: int  # pixels along a side
  tokens: int
  views: tuple[SeenView, ...]
  resize: str  # a value of RESIZES
  pad_color: tuple[int, ...]
  says: dict[str, str]  # to a reader, of all: "model", "all" views, "patches"


def describe(name: str, config: config_lib.Config) -> ModelPage:
  """Returns the description of the model that is served as `name`.

  Raises: ConfigError for a config without a valid model.
  """
  model, data = config.model, config.data
  grid, sizes = build.patch_grid(model), build.view_sizes(model)
  tokens = build.image_token_count(model)
  variant = VARIANTS[model.projector.variant]
  field = variant.detail_field(grid, model.projector.scales)
  kernels = tuple(detail_size(kernel, field) for kernel in variant.detail_kernels)
  views = [_seen(view, size, grid) for view in variant.views for size in sizes]
  if variant.detail_as_tokens:
    views += [window for kernel in kernels for window in _windows(kernel, field)]
  told = [
    dataclasses.replace(view, says=f"Token {i} of {len(views)}: {_words(view, grid)}.")
    for i, view in enumerate(views, 1)
  ]
  about = [f"{tokens} tokens: {len(views)} spatial, {grid * grid} of patches."]
  if kernels and not variant.detail_as_tokens:
    windows = ", ".join(f"{side}×{side}" for side in kernels)
    about.append(f"Each spatial token also attends to windows of {windows} patches.")
  if data.image_aspect == "anyres":
    about.append("Tiles of a larger copy follow, each with such tokens.")
  return ModelPage(
    model=name,
    variant=model.projector.variant,
    grid=grid,
    image_size=model.tower.image_size,
    tokens=tokens,
    views=tuple(told),
    resize=RESIZES[data.image_aspect, data.image_fit],
    pad_color=Preprocess(model.tower.image_size, data.image_mean, data.image_std).pad_color,
    says={
      "model": " ".join(about),
      "all": f"What each of the {len(views)} spatial tokens sees.",
      "patches": f"One token for each of {grid}×{grid} patches.",
    },
  )


def _words(view: SeenView, grid: int) -> str:
  """Says what a view covers."""
  if not view.rows:
    return "a learned vector that sees no part of the picture"
  height, width = (bins[-1][1] - bins[0][0] for bins in (view.rows, view.columns))
  share = 100 * height * width / grid**2
  part = "the whole square" if share == 100 else f"{max(share, 1):.0f}% of the square"
  cells = f"{len(view.rows)}×{len(view.columns)}"
  widths = {after - first for first, after in (*view.rows, *view.columns)}
  if widths == {1}:
    return f"{cells} patches, {part}"
  side = "up to " * (len(widths) > 1) + f"{max(widths)}×{max(widths)}"
  return f"{cells} averages over {side} patches each, {part}"


def _seen(kind: str, size: int, grid: int) -> SeenView:
  """Finds the bins of a view by applying it to features that say which patch they are."""
  which = np.eye(grid, dtype=np.float32)
  rows: Any = np.broadcast_to(which[None, :, None], (1, grid, grid, grid))
  columns: Any = np.broadcast_to(which[None, None], (1, grid, grid, grid))
  apply = VIEWS[kind].apply
  return SeenView(
    kind,
    size,
    tuple(_bin(each) for each in np.asarray(apply(rows, size))[0].any(axis=1)),
    tuple(_bin(each) for each in np.asarray(apply(columns, size))[0].any(axis=0)),
  )


def _bin(seen: np.ndarray) -> tuple[int, int]:
  places = np.flatnonzero(seen)
  return int(places[0]), int(places[-1]) + 1


def _windows(kernel: int, field: int) -> list[SeenView]:
  """Returns the windows of a strided convolution without padding, in the order of its positions."""
  starts = range(0, field - kernel + 1, DETAIL_STRIDE)
  bins = [tuple((start + i, start + i + 1) for i in range(kernel)) for start in starts]
  return [SeenView(DETAIL, kernel, rows, columns) for rows in bins for columns in bins]
