"""Defines visual spatial tokens: views of the feature grid, extractors, and detail interaction.

A spatial token is one view of the grid (a central crop or an adaptive average pool) that an
extractor turns into one vector; the paper's Spatial Feature Extractor is a kernel that covers the
whole view. With detail kernels, tokens also attend to a strided convolution of the grid (its Detail
Feature Integrator). Which of these a variant has is a row of `projector.VARIANTS`.

Shape letters:  B images . G grid side . s view side . C vision width . K token width . S tokens
                P positions of a strided convolution
Source: paper section 3; `llava/model/llava_arch.py` of the original code.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.layers import REST, constrain
from llava_sp_jax.models.transformer import NORM_EPS, Transformer

# torch's default for Linear and Conv2d: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

DETAIL_FIELD, DETAIL_STRIDE = 24, 2  # detail kernels are given for a 24x24 field


def crop(grid: Float[Array, "B G G C"], size: int) -> Float[Array, "B {size} {size} C"]:
  """Returns the central square of `size` x `size` patches."""
  start = grid.shape[1] // 2 - size // 2
  return grid[:, start : start + size, start : start + size]


def pool(grid: Float[Array, "B G G C"], size: int) -> Float[Array, "B {size} {size} C"]:
  """Averages the grid to `size` x `size` vectors, over the bins of torch's adaptive pooling."""
  if size == grid.shape[1]:
    return grid
  bins = jnp.asarray(pooling_matrix(grid.shape[1], size), grid.dtype)
  return jnp.einsum("ih,jw,bhwc->bijc", bins, bins, grid)


def pooling_matrix(side: int, size: int) -> Float[np.ndarray, "{size} {side}"]:
  """Returns the matrix with which `pool` averages one axis of `side` to `size`.

  Row i averages the bin floor(i*side/size) .. ceil((i+1)*side/size); bins may overlap.
  """
  matrix = np.zeros((size, side), np.float32)
  for i in range(size):
    low, high = i * side // size, -(-(i + 1) * side // size)
    matrix[i, low:high] = 1.0 / (high - low)
  return matrix


def nothing(grid: Float[Array, "B G G C"], size: int) -> Float[Array, "B 0 0 C"]:
  """Returns an empty view, for a token that does not depend on the image."""
  return grid[:, :0, :0]


@dataclasses.dataclass(frozen=True)
class View:
  """Describes which part of the grid a spatial token sees.

  `apply` maps the grid and a view size, in patches, to the view. `side` maps that size to the side
  s of the view.
  """

  apply: Callable[[Float[Array, "B G G C"], int], Float[Array, "B s s C"]]
  side: Callable[[int], int] = lambda size: size

  def positions(self, size: int) -> int:
    """Returns the number of feature vectors in a view of a size: s * s."""
    return self.side(size) ** 2


VIEWS = {
  "crop": View(crop),
  "pool": View(pool),
  "register": View(nothing, side=lambda size: 0),
}


class Register(nn.Module):
  """Returns a learned token that does not depend on the view."""

  width: int
  dtype: DTypeLike

  @nn.compact
  def __call__(self, view: Float[Array, "B s s C"]) -> Float[Array, "B K"]:
    # As wide as a kernel's answer to features of unit variance.
    token = self.param("token", nn.initializers.normal(1 / np.sqrt(3)), (self.width,))
    return jnp.broadcast_to(token.astype(self.dtype), (len(view), self.width))


def _conv(
  view: Float[Array, "B s s C"], width: int, dtype: DTypeLike, name: str
) -> Float[Array, "B K"]:
  """Applies a kernel that covers the whole view: one contraction over rows, columns and channels.

  The kernel is divided over all devices along the contraction. Views move to the kernel, and
  partial sums move back.
  """
  dense = nn.Dense(width, use_bias=False, dtype=dtype, kernel_init=torch_uniform, name=name)
  flat = constrain(
    view.reshape(len(view), -1), "batch", None
  )  # the view is made where its rows are
  flat = constrain(flat, None, "contraction")
  return constrain(dense(flat), "batch", None)


def _transformer(
  view: Float[Array, "B s s C"], width: int, dtype: DTypeLike, name: str
) -> Float[Array, "B C"]:
  return Transformer(dtype, name=name)(view)  # its token is as wide as the tower


def _transformer_channels_first(
  view: Float[Array, "B s s C"], width: int, dtype: DTypeLike, name: str
) -> Float[Array, "B C"]:
  """Reads a view as the original reads a pool: [B, C, s, s] is reshaped, not transposed.

  Each vector then holds neighboring values of one or a few channels, instead of one position.
  """
  return _transformer(view.transpose(0, 3, 1, 2).reshape(view.shape), width, dtype, name)


def _register(
  view: Float[Array, "B s s C"], width: int, dtype: DTypeLike, name: str
) -> Float[Array, "B K"]:
  return Register(width, dtype, name=name)(view)


# (regex of a parameter, its uses by one image of a view with so many positions, whether it reads
# the vision tower's features directly); the first match wins.
Uses = tuple[tuple[str, Callable[[int], float], bool], ...]


@dataclasses.dataclass(frozen=True)
class Extractor:
  """Describes how a view becomes one spatial token, and what other tables need to know about it.

  Regular expressions match the whole path of a parameter below the extractor's module,
  `projector/<view>_<scale index>/`. A path has the same axes in every extractor that has it.
  """

  # (view, token width K, dtype, module name) -> tokens, inside the projector.
  build: Callable[[Float[Array, "B s s C"], int, DTypeLike, str], Float[Array, "B K"]]
  uses: Uses = ()  # of the parameters that a matrix product reads: `flops`
  # Logical axes of the parameters that sharding.PARAM_AXES does not know by their names.
  axes: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
  # The parameter whose last axis is the token width; "": the token is as wide as the tower.
  width: str = ""


_TRANSFORMER = Extractor(
  _transformer,
  uses=(
    (r"encoder/.*(kernel|in_proj)", lambda positions: positions, False),
    # queries are one position, keys and values (two thirds of the kernel) those of the view
    (r"decoder/.*cross_attn/in_proj", lambda positions: (1 + 2 * positions) / 3, False),
    (r"decoder/.*(kernel|in_proj)", lambda positions: 1, False),
  ),
  axes=((r".*_attn/in_proj", ("embed", "heads")), (r"query", (None, None, "embed"))),
)

EXTRACTORS: dict[str, Extractor] = {
  # The kernels hold most of the trainable parameters: their long contraction axis takes every
  # device.
  "conv": Extractor(
    _conv,
    uses=((r"kernel", lambda positions: 1, True),),
    axes=((r"kernel", ("contraction", None)),),
    width="kernel",
  ),
  "transformer": _TRANSFORMER,
  "transformer_channels_first": dataclasses.replace(
    _TRANSFORMER, build=_transformer_channels_first
  ),
  "register": Extractor(_register, axes=((r"token", (None,)),), width="token"),
}


def parameter_axes() -> Iterator[tuple[str, tuple[str | None, ...]]]:
  """Yields (regex of a parameter's path, its logical axes) for the parameters of all extractors."""
  views = "|".join(map(re.escape, VIEWS))
  rows = [row for extractor in EXTRACTORS.values() for row in extractor.axes]
  for pattern, axes in dict.fromkeys(rows):  # extractors share rows
    yield rf"projector/({views})_\d+/({pattern})$", axes


# How the details of several kernels are combined, before they are concatenated to the token.
Details = list[Float[Array, "B S K"]]
MERGES: dict[str, Callable[[Details], Details]] = {
  "concat": lambda details: details,
  "sum": lambda details: [functools.reduce(jnp.add, details)],
}


def detail_size(kernel: int, field: int) -> int:
  """Returns the side of a detail kernel for a field of side `field`, in patches, at least 1.

  `kernel` is its side for a field of 24, to which it is proportional.
  """
  return max(1, kernel * field // DETAIL_FIELD)


def _by_patches(
  grid: Float[Array, "B G G C"], kernel: Float[Array, "k k C K"], strides: Any, *_: Any, **__: Any
) -> Float[Array, "B p p K"]:
  """Computes an unpadded convolution as one matmul; P = p p."""
  size, step = kernel.shape[0], strides[0]
  starts = range(0, grid.shape[1] - size + 1, step)
  patches = [grid[:, y : y + size, x : x + size] for y in starts for x in starts]
  flat = jnp.stack(patches, axis=1).reshape(len(grid), len(starts), len(starts), -1)
  return flat @ kernel.reshape(-1, kernel.shape[-1])


# Convolutions that replace the compiler's, by platform. On one CPU device, the compiler's is much
# slower for kernels as large as these.
CONVOLUTIONS: dict[str, Callable[..., Float[Array, "B p p K"]]] = {"cpu": _by_patches}


def _convolution(platform: str) -> Callable[..., Float[Array, "B p p K"]] | None:
  """Returns a faster convolution for one device of the platform, if there is one.

  On several devices the kernel is divided along its channels, and patches would gather it.
  """
  devices = math.prod(jax.sharding.get_abstract_mesh().shape.values())
  return CONVOLUTIONS.get(platform or jax.default_backend()) if devices == 1 else None


class DetailInteraction(nn.Module):
  """Lets spatial tokens attend to a strided convolution of the grid, with a single head.

  `values` may be another interaction's, see `projector.Variant.detail_values`.
  """

  kernel_size: int
  width: int
  dtype: DTypeLike
  platform: str = ""

  def setup(self) -> None:
    norm = functools.partial(nn.LayerNorm, epsilon=NORM_EPS, dtype=self.dtype)
    dense = functools.partial(nn.Dense, self.width, dtype=self.dtype, kernel_init=torch_uniform)
    self.conv = nn.Conv(
      self.width,
      (self.kernel_size, self.kernel_size),
      strides=DETAIL_STRIDE,
      padding="VALID",
      use_bias=False,
      dtype=self.dtype,
      kernel_init=torch_uniform,
      conv_general_dilated=_convolution(self.platform),
    )
    self.query_norm, self.query = norm(), dense()
    self.key_norm, self.key = norm(), dense()
    self.value_norm, self.value = norm(), dense()

  def convolve(self, grid: Float[Array, "B G G C"]) -> Float[Array, "B P K"]:
    """Returns the strided convolution of the grid at its P positions."""
    # The kernel stays, as in `_conv`; images stay apart if there are more devices than channels.
    grid = constrain(grid, REST, None, None, "contraction")
    return constrain(self.conv(grid), "batch", None, None, None).reshape(len(grid), -1, self.width)

  def values(self, detail: Float[Array, "B P K"]) -> Float[Array, "B P K"]:
    """Returns what attention averages: the normalized convolution through a linear layer."""
    return self.value(self.value_norm(detail))

  def __call__(
    self,
    tokens: Float[Array, "B S K"],
    grid: Float[Array, "B G G C"],
    values: Callable[[Float[Array, "B P K"]], Float[Array, "B P K"]] | None = None,
  ) -> Float[Array, "B S K"]:
    detail = self.convolve(grid)
    q, k = self.query(self.query_norm(tokens)), self.key(self.key_norm(detail))
    v = (values or self.values)(detail)
    scores = jnp.einsum("bsk,bpk->bsp", q, k).astype(jnp.float32) / np.sqrt(self.width)
    return jnp.einsum("bsp,bpk->bsk", jax.nn.softmax(scores).astype(v.dtype), v)
