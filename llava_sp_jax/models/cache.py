"""Key-value cache: explicit state that goes in and out of the decoder.

Shape letters:  L layers . B rows . S slots . K key-value heads . H head width
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KVCache(NamedTuple):
  """`segments` is 0 where nothing was written; `length` is the next slot to write in each row.

  `positions` are those within the sample, as the sliding window counts them.
  """

  keys: jax.Array  # [L, B, S, K, H]
  values: jax.Array  # [L, B, S, K, H]
  segments: jax.Array  # [B, S] int32
  positions: jax.Array  # [B, S] int32
  length: jax.Array  # [B] int32


def allocate(layers: int, rows: int, slots: int, kv_heads: int, head_dim: int, dtype) -> KVCache:
  """An empty cache of static size."""
  shape = (layers, rows, slots, kv_heads, head_dim)
  return KVCache(
    jnp.zeros(shape, dtype), jnp.zeros(shape, dtype),
    jnp.zeros((rows, slots), jnp.int32), jnp.zeros((rows, slots), jnp.int32),
    jnp.zeros((rows,), jnp.int32),
  )  # fmt: skip


def write(slots: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
  """Puts `new` at each row's own `start`. [B, S, ...], [B, T, ...], [B] -> [B, S, ...]."""
  return jax.vmap(lambda s, n, i: jax.lax.dynamic_update_slice_in_dim(s, n.astype(s.dtype), i, 0))(
    slots, new, start
  )
