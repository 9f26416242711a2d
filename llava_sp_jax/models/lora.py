"""Adds LoRA by injection: a recipe builds the dense class that the decoder uses.

The kernel keeps its path, with `lora_a` and `lora_b` beside it, so a base checkpoint fits with or
without adapters.
Source: Hu et al. 2021; initialization as in PEFT.

Shape letters:  I width in . R rank . G groups of rows . O width out
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, PRNGKeyArray, UInt32

from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.spatial import torch_uniform


@dataclasses.dataclass(frozen=True)
class LoraRecipe:
  """Holds the settings of LoRA; hashable. `dense()` builds the class of linear layers."""

  rank: int
  alpha: float
  dropout: float = 0.0
  base: Any = nn.Dense  # the class below the adapters; for QLoRA, a quantized one

  def dense(self) -> Any:
    """Returns the class of linear layers: `LoraDense` with these settings, or `base` for rank 0."""
    if not self.rank:
      return self.base
    return functools.partial(
      LoraDense, rank=self.rank, alpha=self.alpha, dropout=self.dropout, base=self.base
    )


class LoraDense(nn.Module):
  """Computes `x W + (alpha / rank) dropout(x) A B`. [..., I] -> [..., features].

  Dropout is applied only when an rng named "dropout" is passed to `apply`.
  """

  features: int
  rank: int
  alpha: float
  dropout: float = 0.0
  use_bias: bool = True
  dtype: DTypeLike | None = None
  kernel_init: Any = nn.initializers.lecun_normal()
  base: Any = nn.Dense

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "*B I"],
    low: Float[Array, "*B R"] | None = None,
    only_a: bool = False,
  ) -> Float[Array, "*B features"] | Float[Array, "I R"] | Float[Array, "G I R"]:
    """Returns the output, or the matrix A with `only_a`.

    `low` is the result of `lower`, if `fused` has already computed it for several layers at once.
    """
    base = self.base(
      self.features, use_bias=self.use_bias, dtype=self.dtype, kernel_init=self.kernel_init
    )
    nn.share_scope(self, base)
    a = self._adapter("lora_a", torch_uniform, (x.shape[-1], self.rank))
    if only_a:
      return a.astype(self.dtype or x.dtype)
    if low is None:
      low = self.lower(x, a)
    b = self._adapter("lora_b", nn.initializers.zeros_init(), (self.rank, self.features))
    scale = self.alpha / self.rank / (1 - self._rate())  # cheapest here: R < I, features
    # The barrier makes the sum, and an activation behind it, the end of the large product. Without it,
    # XLA sums in a pass of its own, and computes the activation again for each product that reads it.
    added = jax.lax.optimization_barrier(multiplied(low * scale, b.astype(low.dtype)))
    result: jax.Array = base(x) + added
    return result

  def _adapter(
    self, name: str, init: Any, shape: tuple[int, int]
  ) -> Float[Array, "_I _O"] | Float[Array, "G _I _O"]:
    """Returns a matrix, or the copies of it that `sharding.for_groups` made."""
    held: Any = self.get_variable("params", name)
    if held is not None and held.ndim == 3:
      copies: jax.Array = held
      return copies
    made: jax.Array = self.param(name, init, shape)
    return made

  def _rate(self) -> float:
    return self.dropout if self.has_rng("dropout") else 0.0

  @nn.nowrap
  def lower(
    self, x: Float[Array, "*B I"], a: Float[Array, "I R"] | Float[Array, "G I R"]
  ) -> Float[Array, "*B R"]:
    """Returns the dropped-out x times A, without the factor 1 / (1 - rate) of dropout.

    It must be called inside a compact method.
    """
    x = x.astype(self.dtype or x.dtype)
    if rate := self._rate():
      x = jnp.where(keep(self.make_rng("dropout"), x.shape, rate), x, 0)
    result: jax.Array = checkpoint_name(multiplied(x, a.astype(x.dtype)), "low")
    return result


def multiplied(
  x: Float[Array, "*B I"], matrix: Float[Array, "I O"] | Float[Array, "G I O"]
) -> Float[Array, "*B O"]:
  """Multiplies by a matrix, or each of G groups of consecutive rows by its own copy.

  B is a multiple of G.
  """
  if matrix.ndim == 2:
    return x @ matrix
  grouped = x.reshape(matrix.shape[0], -1, *x.shape[1:])
  result: jax.Array = jnp.einsum("g...i,gio->g...o", grouped, matrix)
  return result.reshape(*x.shape[:-1], matrix.shape[-1])


def keep(key: PRNGKeyArray, shape: tuple[int, ...], rate: float) -> Bool[Array, "*B I"]:
  """Draws a dropout mask: True with probability 1 - rate.

  Each value is the product of a random number of its row and an odd one of its column, modulo 2^32,
  compared with a threshold (multiply-shift hashing: any two values are almost independent). That
  takes 2 vector operations, where jax.random needs a hundred, which took a tenth of a step. As with
  jax.random, the mask is the same on every mesh.
  Source: Dietzfelbinger et al. 1997, A reliable randomized algorithm for the closest-pair problem.
  """
  seed, other = jax.random.bits(key, (2,), jnp.uint32)
  row = seed
  for axis in range(len(shape) - 1):
    row = _mix(row + jax.lax.broadcasted_iota(jnp.uint32, (*shape[:-1], 1), axis))
  column = _mix(other + jnp.arange(shape[-1], dtype=jnp.uint32)) | 1
  result: jax.Array = row * column >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
  return result


def _mix(x: UInt32[Array, "*B"]) -> UInt32[Array, "*B"]:
  """Applies murmur3's finalizer, after which every bit depends on all bits of `x`."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  result: jax.Array = x ^ (x >> 16)
  return result


def fused(
  layers: Sequence[nn.Module], x: Float[Array, "*B I"]
) -> list[Float[Array, "*B _features"]]:
  """Applies several layers to the same input.

  It must be called inside a compact method. Adapters read the input in one matmul with all of their
  A side by side: a single A of rank 128 costs as much for reading `x` as for its FLOPs. The layers
  also share one dropout mask.
  """
  first = layers[0]
  if not isinstance(first, LoraDense) or len(layers) == 1:
    return [layer(x) for layer in layers]
  a = jnp.concatenate([layer(x, only_a=True) for layer in layers], axis=-1)
  low = first.lower(x, a)
  return [
    layer(x, part) for layer, part in zip(layers, jnp.split(low, len(layers), axis=-1), strict=True)
  ]
