"""Defines torch's nn.Transformer without biases, an extractor of spatial tokens.

Shape letters:  B images . s view side . C vision width . T,M sequences . N heads . H head width
                D model width
Source: torch.nn.Transformer; `llava/model/llava_arch.py` of the original code.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float

from llava_sp_jax.models.arrays import Array

NORM_EPS = 1e-5
DEPTH, HEADS, DROPOUT = 4, 8, 0.1  # layers on each side, heads of each layer


class MultiHeadAttention(nn.Module):
  """Computes torch's MultiheadAttention without biases.

  One array holds the kernels of queries, keys and values, as in torch.
  """

  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], memory: Float[Array, "B M D"]
  ) -> Float[Array, "B T D"]:
    width = x.shape[-1]
    if width % HEADS:
      raise ValueError(f"the tower's width {width} must be a multiple of {HEADS}, the heads here")
    kernel = self.param("in_proj", nn.initializers.xavier_uniform(), (width, 3 * width))
    query, key, value = jnp.split(kernel.astype(self.dtype), 3, axis=1)

    def heads(x: Float[Array, "B T D"], kernel: Float[Array, "D D"]) -> Float[Array, "B T N H"]:
      return (x.astype(self.dtype) @ kernel).reshape(*x.shape[:2], HEADS, width // HEADS)

    q, k, v = heads(x, query), heads(memory, key), heads(memory, value)
    scores = jnp.einsum("btnh,bmnh->bntm", q, k).astype(jnp.float32) / np.sqrt(width // HEADS)
    weights = jax.nn.softmax(scores).astype(self.dtype)
    weights = nn.Dropout(DROPOUT, deterministic=not self.has_rng("dropout"))(weights)
    out = jnp.einsum("bntm,bmnh->btnh", weights, v).reshape(x.shape)
    return _bare(width, self.dtype, "o_proj")(out)


def _bare(width: int, dtype: DTypeLike, name: str) -> nn.Dense:
  """Makes a linear layer without bias, initialized as in torch's Transformer."""
  kernel_init = nn.initializers.xavier_uniform()
  return nn.Dense(width, use_bias=False, dtype=dtype, kernel_init=kernel_init, name=name)


class TransformerLayer(nn.Module):
  """Computes a pre-norm layer, which also attends to `memory` if there is one.

  The second value, None, is what a scan expects.
  """

  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], memory: Float[Array, "B M D"] | None
  ) -> tuple[Float[Array, "B T D"], None]:
    norm = functools.partial(nn.LayerNorm, epsilon=NORM_EPS, use_bias=False, dtype=self.dtype)
    dropout = nn.Dropout(DROPOUT, deterministic=not self.has_rng("dropout"))
    y = norm(name="self_norm")(x)
    x = x + dropout(MultiHeadAttention(self.dtype, name="self_attn")(y, y))
    if memory is not None:
      y = norm(name="cross_norm")(x)
      x = x + dropout(MultiHeadAttention(self.dtype, name="cross_attn")(y, memory))
    y = norm(name="mlp_norm")(x)
    y = dropout(nn.relu(_bare(x.shape[-1], self.dtype, "fc1")(y)))
    return x + dropout(_bare(x.shape[-1], self.dtype, "fc2")(y)), None


class TransformerStack(nn.Module):
  """Computes torch's encoder, or its decoder if there is a `memory`, with a norm at the end."""

  dtype: DTypeLike

  @nn.compact
  def __call__(
    self, x: Float[Array, "B T D"], memory: Float[Array, "B M D"] | None
  ) -> Float[Array, "B T D"]:
    layers = nn.scan(
      TransformerLayer,
      variable_axes={"params": 0},
      in_axes=nn.broadcast,
      length=DEPTH,
      split_rngs={"params": True, "dropout": True},
    )
    x, _ = layers(self.dtype, name="layers")(x, memory)
    result: jax.Array = nn.LayerNorm(
      epsilon=NORM_EPS, use_bias=False, dtype=self.dtype, name="norm"
    )(x)
    return result


class Transformer(nn.Module):
  """Lets a learned query read a view through torch's nn.Transformer.

  There is no positional encoding. Dropout is applied only when an rng named "dropout" is passed.
  """

  dtype: DTypeLike

  @nn.compact
  def __call__(self, view: Float[Array, "B s s C"]) -> Float[Array, "B C"]:
    images, width = len(view), view.shape[-1]
    query = self.param("query", nn.initializers.zeros_init(), (1, 1, width))
    memory = TransformerStack(self.dtype, name="encoder")(view.reshape(images, -1, width), None)
    target = jnp.broadcast_to(query.astype(self.dtype), (images, 1, width))
    return TransformerStack(self.dtype, name="decoder")(target, memory)[:, 0]
