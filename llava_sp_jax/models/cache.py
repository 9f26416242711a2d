"""Key-value cache: explicit state. The decoder reads it and returns what is new; the caller writes.

Written once after all layers, into a donated buffer, a step copies nothing of what it keeps.

Shape letters:  L layers . B rows . S slots . T new positions . K key-value heads . H head width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Layers = Any  # [L, ...] for stacked layers, otherwise a tuple of L arrays [...]


class KVCache(NamedTuple):
  """Slot i of a row holds position i of its sample; only the first `length` hold anything."""

  keys: Layers  # [B, K, S, H] for each layer
  values: Layers  # [B, K, S, H] for each layer
  length: jax.Array  # [B] int32

  @property
  def slots(self) -> int:
    return self.keys[0].shape[-2]


class New(NamedTuple):
  """Keys and values of T positions, which follow each row's `length`."""

  keys: Layers  # [B, K, T, H] for each layer
  values: Layers  # [B, K, T, H] for each layer


def allocate(
  layers: int, rows: int, slots: int, kv_heads: int, head_dim: int, dtype: Any, stacked: bool = True
) -> KVCache:
  """An empty cache of static size; with 0 slots, what a prompt starts from."""
  shape = (rows, kv_heads, slots, head_dim)

  def empty() -> Layers:
    if stacked:
      return jnp.zeros((layers, *shape), dtype)
    return tuple(jnp.zeros(shape, dtype) for _ in range(layers))

  return KVCache(empty(), empty(), jnp.zeros((rows,), jnp.int32))


def append(cache: KVCache, new: New, count: jax.Array) -> KVCache:
  """Writes what is new behind each row's length, which grows by `count` [B] of its positions.

  There must be T free slots behind the length; those after `count` are written and do not matter.
  """

  def place(slots: jax.Array, new: jax.Array) -> jax.Array:  # [(L,) B, K, S, H], [(L,) B, K, T, H]
    at = jax.lax.dynamic_update_slice_in_dim
    rows = jax.vmap(lambda s, n, i: at(s, n.astype(s.dtype), i, 1))
    rows = jax.vmap(rows, (0, 0, None)) if slots.ndim == 5 else rows
    return rows(slots, new, cache.length)

  return KVCache(
    jax.tree.map(place, cache.keys, new.keys), jax.tree.map(place, cache.values, new.values),
    cache.length + count,
  )  # fmt: skip


def widen(cache: KVCache, slots: int) -> KVCache:
  """The same with `slots` slots in each row, at least as many as there are."""

  def pad(x: jax.Array) -> jax.Array:
    extra = [(0, 0)] * x.ndim
    extra[-2] = (0, slots - x.shape[-2])
    return jnp.pad(x, extra)

  return cache._replace(keys=jax.tree.map(pad, cache.keys), values=jax.tree.map(pad, cache.values))


def unstack(tree: Any, count: int) -> tuple[Any, ...]:
  """A tree of [L, ...] leaves -> L trees of [...] leaves."""
  return tuple(jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count))


def stack(layers: Sequence[jax.Array] | jax.Array) -> jax.Array:
  """Either form -> [L, ...]."""
  return layers if isinstance(layers, jax.Array) else jnp.stack(layers)
