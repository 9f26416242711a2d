"""LoRA by injection: a recipe that builds the dense class of the decoder.

The kernel keeps its path; `lora_a` and `lora_b` stand beside it, so a base checkpoint fits with or
without adapters. Source: Hu et al. 2021; initialisation as in PEFT.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llava_sp_jax.models.projector import torch_uniform


@dataclasses.dataclass(frozen=True)
class Lora:
  """A hashable recipe: `dense()` is the class that the decoder uses for its linear layers."""

  rank: int
  alpha: float
  dropout: float = 0.0

  def dense(self) -> Any:
    if not self.rank:
      return nn.Dense
    return functools.partial(LoraDense, rank=self.rank, alpha=self.alpha, dropout=self.dropout)


class LoraDense(nn.Module):
  """`x W + (alpha / rank) dropout(x) A B`. [..., I] -> [..., features].

  Dropout acts only when an rng named "dropout" is passed to `apply`.
  """

  features: int
  rank: int
  alpha: float
  dropout: float = 0.0
  use_bias: bool = True
  dtype: jnp.dtype | None = None
  kernel_init: Any = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    base = nn.Dense(
      self.features, use_bias=self.use_bias, dtype=self.dtype, kernel_init=self.kernel_init
    )
    nn.share_scope(self, base)
    a = self.param("lora_a", torch_uniform, (x.shape[-1], self.rank))
    b = self.param("lora_b", nn.initializers.zeros_init(), (self.rank, self.features))
    dropped = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
    low = dropped.astype(self.dtype or x.dtype) @ a.astype(self.dtype or x.dtype)
    return base(x) + (low @ b.astype(low.dtype)) * (self.alpha / self.rank)
