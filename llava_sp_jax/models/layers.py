"""Layers that tower and decoder share: norms, rotary positions, masks, attention.

Shape letters:  B batch . T queries . S keys . N heads . K key-value heads . H head width . D width
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# Segment ids say who may see whom. 0 is padding. A sample owns the ids n*BRANCHES .. +BRANCHES-1:
# the first is its trunk, which all its branches see; branches do not see each other.
BRANCHES = 1 << 12


class RMSNorm(nn.Module):
  """Root-mean-square norm in float32. [..., D] -> [..., D]. (LLaMA)."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return x32.astype(x.dtype) * scale.astype(x.dtype)


def rotary(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
  """Rotary embedding, half-split as in Hugging Face. [B, T, N, H], [B, T] -> [B, T, N, H]."""
  half = x.shape[-1] // 2
  # A power correctly rounded to float32 gives torch's bits; at position 600 one bit more or less is
  # 4e-5 of an angle.
  exponent = np.arange(half, dtype=np.float32) / np.float32(half)
  frequency = np.float32(1) / (theta ** exponent.astype(np.float64)).astype(np.float32)
  angle = positions[..., None].astype(np.float32) * frequency  # [B, T, H/2]
  cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def causal_mask(
  query_index: jax.Array, query_segments: jax.Array, key_index: jax.Array, key_segments: jax.Array
) -> jax.Array:
  """Who sees whom: earlier entries of the same segment and of its trunk.

  Args: query_index, query_segments [B, T]; key_index, key_segments [B, S] (index within the row,
  segments as described at `BRANCHES`). Returns: [B, T, S] bool.
  """
  query, key = query_segments[:, :, None], key_segments[:, None, :]
  related = (key == query) | (key == query // BRANCHES * BRANCHES)
  return related & (key > 0) & (key_index[:, None, :] <= query_index[:, :, None])


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Attention with grouped heads. [B, T, N, H], [B, S, K, H] x2, [B, T, S] -> [B, T, N, H]."""
  return jax.nn.dot_product_attention(
    q, k, v, mask=None if mask is None else mask[:, None], implementation="xla"
  )
