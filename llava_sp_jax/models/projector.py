"""Vision-to-language projector: a patch MLP, optionally preceded by visual spatial tokens.

A spatial token is one view of the feature grid (a central crop or an adaptive average pool) seen by
a kernel that covers the whole view (the paper's Spatial Feature Extractor). With detail kernels,
tokens also attend to a strided convolution of the grid (its Detail Feature Integrator).

Shape letters:  B images . G grid side . C vision width . K token width . S tokens . D model width
Source: paper section 3; `llava/model/llava_arch.py` of the original code.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# torch's default for Linear and Conv2d: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def crop(grid: jax.Array, size: int) -> jax.Array:
  """The central square. [B, G, G, C] -> [B, size, size, C]."""
  start = grid.shape[1] // 2 - size // 2
  return grid[:, start : start + size, start : start + size]


def pool(grid: jax.Array, size: int) -> jax.Array:
  """Adaptive average pooling with torch's bins. [B, G, G, C] -> [B, size, size, C]."""
  if size == grid.shape[1]:
    return grid
  bins = jnp.asarray(pooling_matrix(grid.shape[1], size), grid.dtype)
  return jnp.einsum("ih,jw,bhwc->bijc", bins, bins, grid)


def pooling_matrix(side: int, size: int) -> np.ndarray:
  """Rows average bins floor(i*side/size) .. ceil((i+1)*side/size), which overlap. [size, side]."""
  matrix = np.zeros((size, side), np.float32)
  for i in range(size):
    low, high = i * side // size, -(-(i + 1) * side // size)
    matrix[i, low:high] = 1.0 / (high - low)
  return matrix


VIEWS = {"crop": crop, "pool": pool}


@dataclasses.dataclass(frozen=True)
class Row:
  """One variant of the projector; an empty `view` is LLaVA-1.5's plain MLP."""

  view: str = ""
  parts: int = 6  # scales are 1/parts, 2/parts .. of the grid side
  detail_kernels: tuple[int, ...] = ()
  out_bias: bool = False

  def scales(self, grid: int) -> tuple[int, ...]:
    """View sizes for a grid side, small to large; one token each."""
    if not self.view:
      return ()
    if grid < self.parts:
      raise ValueError(f"a {grid}x{grid} grid is too small for {self.parts} scales")
    return tuple(grid * (i + 1) // self.parts for i in range(self.parts))


ROWS = {
  "none": Row(),
  "pooling": Row(view="pool"),
  "cropping": Row(view="crop", detail_kernels=(16,), out_bias=True),
  "cropping_sfe": Row(view="crop"),
  "pooling_dfi": Row(view="pool", detail_kernels=(16,)),
}


def spatial_token_count(row: str, grid: int) -> int:
  """How many spatial tokens stand before the patch tokens of one image."""
  return len(ROWS[row].scales(grid))


class DetailInteraction(nn.Module):
  """Spatial tokens attend to a strided convolution of the grid. [B,S,K], [B,G,G,C] -> [B,S,K].

  Single head, stride 2; the kernel is given for the 24x24 grid and scales with the grid.
  """

  kernel_size: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, tokens: jax.Array, grid: jax.Array) -> jax.Array:
    width = tokens.shape[-1]
    size = max(1, self.kernel_size * grid.shape[1] // 24)
    detail = nn.Conv(
      width, (size, size), strides=2, padding="VALID", use_bias=False, dtype=self.dtype,
      kernel_init=torch_uniform, name="conv",
    )(grid).reshape(len(grid), -1, width)  # fmt: skip

    def project(name: str, x: jax.Array) -> jax.Array:
      x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=f"{name}_norm")(x)
      return nn.Dense(width, dtype=self.dtype, kernel_init=torch_uniform, name=name)(x)

    q, k, v = project("query", tokens), project("key", detail), project("value", detail)
    scores = jnp.einsum("bsk,bpk->bsp", q, k).astype(jnp.float32) / np.sqrt(width)
    return jnp.einsum("bsp,bpk->bsk", jax.nn.softmax(scores).astype(v.dtype), v)


class Projector(nn.Module):
  """Image tokens of the language model: spatial tokens first, then one per patch."""

  row: str
  token_width: int
  out_width: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, grid: jax.Array) -> jax.Array:  # [B, G, G, C] -> [B, S + G*G, D]
    row = ROWS[self.row]
    dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=torch_uniform)
    patches = grid.reshape(len(grid), -1, grid.shape[-1])
    patches = dense(self.out_width, name="fc1")(patches)
    patches = dense(self.out_width, name="fc2")(nn.gelu(patches, approximate=False))
    if not row.view:
      return patches
    # A kernel that covers its view is one contraction over rows, columns and channels.
    tokens = jnp.stack(
      [
        dense(self.token_width, use_bias=False, name=f"{row.view}_{i}")(
          VIEWS[row.view](grid, size).reshape(len(grid), -1)
        )
        for i, size in enumerate(row.scales(grid.shape[1]))
      ],
      axis=1,
    )
    details = [DetailInteraction(k, self.dtype, name=f"detail_{k}")(tokens, grid)
               for k in row.detail_kernels]  # fmt: skip
    tokens = nn.gelu(jnp.concatenate([tokens, *details], axis=-1), approximate=False)
    tokens = dense(self.out_width, use_bias=row.out_bias, name="out")(tokens)
    return jnp.concatenate([tokens, patches], axis=1)
