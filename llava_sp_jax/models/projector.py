"""Defines the vision-to-language projector: a patch MLP, optionally with visual spatial tokens.

Every variant is a row of VARIANTS; a row names parts of `spatial`.

Shape letters:  B images . G grid side . C vision width . S spatial tokens . D model width
Source: paper section 3; `llava/model/llava_arch.py` of the original code.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from llava_sp_jax.models.arrays import Array, DType
from llava_sp_jax.models.layers import constrain
from llava_sp_jax.models.spatial import (
  DETAIL_STRIDE,
  EXTRACTORS,
  MERGES,
  VIEWS,
  DetailInteraction,
  detail_size,
  torch_uniform,
)


@dataclasses.dataclass(frozen=True)
class Variant:
  """Describes one variant of the projector.

  Without views and detail kernels, it is the plain MLP of LLaVA-1.5.
  """

  views: tuple[str, ...] = ()  # rows of VIEWS; one token for each view and scale
  parts: int = 6  # scales are 1/parts, 2/parts .. of the grid side
  extractor: str = "conv"  # a row of EXTRACTORS
  detail_kernels: tuple[int, ...] = ()
  detail_values: tuple[int, ...] = ()  # whose value projection each kernel uses; empty: its own
  detail_merge: str = "concat"  # a row of MERGES
  detail_as_tokens: bool = False  # positions of the convolution are the tokens; nothing attends
  out_bias: bool = False

  def scales(self, grid: int, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """Returns the side lengths of the views, in patches, ascending.

    Args:
      grid: patches along one side of the image.
      wanted: sizes to use instead of the variant's own, which are equal parts of the grid; empty
        for those.

    Raises: ValueError for sizes that the grid or the variant does not have.
    """
    if not self.views:
      if wanted:
        raise ValueError(f"scales {tuple(wanted)}, but the variant has no views; leave them out")
      return ()
    if not wanted and grid < self.parts:
      raise ValueError(f"a {grid}x{grid} grid is too small for {self.parts} scales")
    sizes = tuple(wanted) or tuple(grid * (i + 1) // self.parts for i in range(self.parts))
    if sorted({0, *sizes}) != [0, *sizes] or sizes[-1] > grid:
      raise ValueError(f"scales {sizes}: expected growing sizes from 1 to the grid's {grid}")
    return sizes

  def detail_field(self, grid: int, wanted: Sequence[int] = ()) -> int:
    """Returns the side, in patches, of what detail kernels see.

    That is the side of the largest view, or `grid` for a variant without views. `wanted` replaces
    the variant's own sizes of views.
    """
    sizes = self.scales(grid, wanted)
    return sizes[-1] if sizes else grid


VARIANTS = {
  "none": Variant(),
  "pooling": Variant(views=("pool",)),
  "cropping": Variant(views=("crop",), detail_kernels=(16,), out_bias=True),
  "cropping_sfe": Variant(views=("crop",)),
  "pooling_dfi": Variant(views=("pool",), detail_kernels=(16,)),
  # The original's middle kernel uses the value projection of the first one.
  "cropping_multiscale_dfi": Variant(
    views=("crop",), detail_kernels=(12, 9, 5), detail_values=(12, 12, 5)
  ),
  "pooling_multiscale_dfi": Variant(
    views=("pool",), detail_kernels=(12, 9, 5), detail_values=(12, 12, 5), detail_merge="sum",
    out_bias=True,
  ),
  "tokens_1": Variant(views=("crop",), parts=1),
  "tokens_3": Variant(views=("crop",), parts=3),
  "tokens_12": Variant(views=("crop",), parts=12),
  "crop_224": Variant(views=("crop",), parts=8),
  "cropping_transformer": Variant(views=("crop",), extractor="transformer"),
  "pooling_transformer": Variant(views=("pool",), extractor="transformer_channels_first"),
  "detail_only": Variant(detail_kernels=(12,), detail_as_tokens=True),
  "both": Variant(views=("crop", "pool")),
  "register": Variant(views=("register",), extractor="register"),
}  # fmt: skip


def check_grid(variant: str, shape: Sequence[int]) -> None:
  """Checks the shape of a projector's input.

  Raises: ValueError for an unknown variant, or a shape other than a square grid [B, G, G, C].
  """
  if variant not in VARIANTS:
    raise ValueError(f"projector variant {variant!r}: expected one of {', '.join(VARIANTS)}")
  if len(shape) != 4 or shape[1] != shape[2] or 0 in shape:
    raise ValueError(
      f"projector {variant}: expected features [B, G, G, C] of a square grid, found {list(shape)}; "
      "patch tokens [B, G*G, C] are reshaped so, without a class token"
    )


def spatial_token_count(variant: str, grid: int, scales: Sequence[int] = ()) -> int:
  """Returns the number of spatial tokens that precede the patch tokens of one tile.

  Args:
    variant: a row of VARIANTS.
    grid: patches along one side of the tile.
    scales: sides of the views in patches; empty for the variant's own.

  Raises: ValueError for scales that the grid or the variant does not have.
  """
  spec, sizes = VARIANTS[variant], VARIANTS[variant].scales(grid, scales)
  field = spec.detail_field(grid, scales)
  positions = [(field - detail_size(k, field)) // DETAIL_STRIDE + 1 for k in spec.detail_kernels]
  as_tokens = sum(p * p for p in positions) if spec.detail_as_tokens else 0
  return len(spec.views) * len(sizes) + as_tokens


class Projector(nn.Module):
  """Computes the image tokens of the language model: spatial tokens, then one token for each patch.

  `scales` replaces the variant's own view sizes. With `newline` it also holds `image_newline` [D],
  the token that ends a row of tile patches. `platform` is that of the devices ("": where jax runs).
  """

  variant: str
  token_width: int
  out_width: int
  dtype: DType = jnp.float32
  scales: tuple[int, ...] = ()
  newline: bool = False
  platform: str = ""

  def setup(self) -> None:
    if self.newline:
      normal = nn.initializers.normal(1 / np.sqrt(self.out_width))
      self.image_newline = self.param("image_newline", normal, (self.out_width,))

  @nn.compact
  def __call__(
    self, grid: Float[Array, " ..."]
  ) -> Float[Array, "B N D"]:  # [B, G, G, C] -> N = S + G*G
    check_grid(self.variant, grid.shape)
    dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=torch_uniform)
    grid = constrain(grid, "batch", None, None, None)  # only the views below move
    patches = grid.reshape(len(grid), -1, grid.shape[-1])
    patches = dense(self.out_width, name="fc1")(patches)
    patches = dense(self.out_width, name="fc2")(nn.gelu(patches, approximate=False))
    if not spatial_token_count(self.variant, grid.shape[1], self.scales):
      return patches
    tokens = nn.gelu(self._spatial(grid), approximate=False)
    tokens = dense(self.out_width, use_bias=VARIANTS[self.variant].out_bias, name="out")(tokens)
    return jnp.concatenate([tokens, patches], axis=1)

  def _spatial(self, grid: Float[Array, "B G G C"]) -> Float[Array, "B S W"]:
    """Computes spatial tokens with their details, before the output layer; W is K, or K for each."""
    variant, side = VARIANTS[self.variant], grid.shape[1]
    scales, field = variant.scales(side, self.scales), variant.detail_field(side, self.scales)
    details = {
      k: DetailInteraction(
        detail_size(k, field), self.token_width, self.dtype, self.platform, name=f"detail_{k}"
      )
      for k in variant.detail_kernels
    }
    if variant.detail_as_tokens:
      return jnp.concatenate([detail.convolve(grid) for detail in details.values()], axis=1)
    extract = EXTRACTORS[variant.extractor].build
    tokens = jnp.stack(
      [
        extract(VIEWS[view].apply(grid, size), self.token_width, self.dtype, f"{view}_{i}")
        for view in variant.views
        for i, size in enumerate(scales)
      ],
      axis=1,
    )
    if not details:
      return tokens
    # The details see the largest view: the whole grid, unless the config's scales stop before it.
    seen = VIEWS[variant.views[0]].apply(grid, field)
    owners = variant.detail_values or variant.detail_kernels
    found = [
      details[k](tokens, seen, details[owner].values)
      for k, owner in zip(variant.detail_kernels, owners, strict=True)
    ]
    return jnp.concatenate([tokens, *MERGES[variant.detail_merge](found)], axis=-1)
