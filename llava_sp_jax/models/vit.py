"""Computes the vision transformer of CLIP or SigLIP, which differ in a row of TOWER_VARIANTS.

Shape letters:  B images . P patches (+1 class token) . C width . G grid side
Source: the towers of Hugging Face `modeling_clip.py` and `modeling_siglip.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float

from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.layers import attend


def quick_gelu(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
  """Computes x * sigmoid(1.702 x), OpenAI's approximation of GELU."""
  return x * jax.nn.sigmoid(1.702 * x)


@dataclasses.dataclass(frozen=True)
class TowerVariant:
  """Holds the architecture switches of a family of towers."""

  class_token: bool
  pre_norm: bool
  patch_bias: bool
  activation: Callable[[Float[Array, "*B"]], Float[Array, "*B"]]
  eps: float


TOWER_VARIANTS = {
  "clip": TowerVariant(True, True, False, quick_gelu, 1e-5),
  "siglip": TowerVariant(False, False, True, functools.partial(nn.gelu, approximate=True), 1e-6),
}


class EncoderBlock(nn.Module):
  """Computes a pre-norm transformer block; the second value, None, is what a scan expects."""

  heads: int
  mlp_width: int
  activation: Callable[[Float[Array, "*B"]], Float[Array, "*B"]]
  eps: float
  dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "B P C"]) -> tuple[Float[Array, "B P C"], None]:
    width = x.shape[-1]
    dense = functools.partial(nn.Dense, dtype=self.dtype)
    norm = functools.partial(nn.LayerNorm, epsilon=self.eps, dtype=self.dtype)
    y = norm(name="attn_norm")(x)
    split = (*y.shape[:2], self.heads, width // self.heads)
    q, k, v = (dense(width, name=f"{n}_proj")(y).reshape(split) for n in "qkv")
    x = x + dense(width, name="o_proj")(attend(q, k, v, None).reshape(y.shape))
    y = norm(name="mlp_norm")(x)
    y = dense(width, name="fc2")(self.activation(dense(self.mlp_width, name="fc1")(y)))
    return nn.with_logical_constraint(x + y, ("batch", None, None)), None


class VisionTransformer(nn.Module):
  """Computes the patch features of the selected layer, without class token and post-norm.

  `select_layer` indexes the hidden states. 0 is the embedding, and negative ones count from the
  end: -2 leaves out the last block.
  """

  variant: str
  image_size: int
  patch_size: int
  width: int
  layers: int
  heads: int
  mlp_width: int
  select_layer: int = -2
  scan_unroll: int = 1
  stacked: bool = True  # parameters of all layers as one; otherwise `layers_0`, `layers_1` ..
  dtype: DTypeLike = jnp.float32
  initializer_range: float = 0.02  # of class and position embeddings

  @property
  def grid(self) -> int:
    """Returns G, the number of patches along one side."""
    return self.image_size // self.patch_size

  @nn.compact
  def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B G G C"]:
    row = TOWER_VARIANTS[self.variant]
    norm = functools.partial(nn.LayerNorm, epsilon=row.eps, dtype=self.dtype)
    x = nn.Dense(self.width, use_bias=row.patch_bias, dtype=self.dtype, name="patch_embed")(
      patchify(images, self.patch_size, self.grid)
    )
    normal = nn.initializers.normal(self.initializer_range)
    if row.class_token:
      token = self.param("class_embed", normal, (self.width,)).astype(x.dtype)
      x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
    x = x + self.param("position_embed", normal, x.shape[1:]).astype(x.dtype)
    if row.pre_norm:
      x = norm(name="pre_norm")(x)
    count = self.layers + 1 + self.select_layer if self.select_layer < 0 else self.select_layer
    sizes = (self.heads, self.mlp_width, row.activation, row.eps, self.dtype)
    if count and self.stacked:
      blocks = nn.scan(
        EncoderBlock,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=count,
        unroll=min(self.scan_unroll, count),
      )
      x, _ = blocks(*sizes, name="layers")(x)
    elif count:
      for i in range(count):
        x, _ = EncoderBlock(*sizes, name=f"layers_{i}")(x)
    if row.class_token:
      x = x[:, 1:]
    return x.reshape(len(x), self.grid, self.grid, self.width)


def patchify(
  images: Float[Array, "B H W 3"], patch: int, grid: int
) -> Float[Array, "B {grid}*{grid} {patch}*{patch}*3"]:
  """Cuts images into flat patches (row, column, channel).

  `patch` is the side of a patch in pixels, `grid` the number of patches along a side.
  """
  side = grid * patch  # a remainder of the image is dropped, as a strided convolution does
  x = images[:, :side, :side].reshape(len(images), grid, patch, grid, patch, 3)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(images), grid * grid, -1)
