"""Key-value cache: explicit state. The decoder reads it and returns what is new; the caller writes.

Written once for all layers, into a donated buffer, a step copies nothing of what it keeps. Keys lie
transposed, so that both products of attention run along the lines of what they read.

Shape letters:  L layers . B rows . S capacity . T new positions . K key-value heads . H head width
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Layers = Any  # [L, ...] for stacked layers, otherwise a tuple of L arrays [...]
POSITION_AXES = (-1, -2)  # in keys and in values


class KVCache(NamedTuple):
  """Keys and values of each row's first `length` positions, with room for S, the capacity."""

  keys: Layers  # [B, K, H, S] for each layer
  values: Layers  # [B, K, S, H] for each layer
  length: jax.Array  # [B] int32

  @property
  def capacity(self) -> int:
    return self.values[0].shape[-2]


class New(NamedTuple):
  """Keys and values of T positions, which follow each row's `length`."""

  keys: Layers  # [B, K, H, T] for each layer
  values: Layers  # [B, K, T, H] for each layer


def both(change: Callable[..., Any], *held: Any) -> tuple[Any, Any]:
  """`change(axis of the positions, *arrays)` of the keys, and of the values, of every layer.

  `held` begin with keys and values, as `KVCache` and `New` do.
  """
  keys, values = (
    jax.tree.map(functools.partial(change, axis), *(pair[i] for pair in held))
    for i, axis in enumerate(POSITION_AXES)
  )
  return keys, values


def allocate(
  layers: int,
  rows: int,
  capacity: int,
  kv_heads: int,
  head_dim: int,
  dtype: Any,
  stacked: bool = True,
) -> KVCache:
  """An empty cache of static size; with a capacity of 0, what a prompt starts from."""

  def empty(*sizes: int) -> Layers:
    shape = (rows, kv_heads, *sizes)
    if stacked:
      return jnp.zeros((layers, *shape), dtype)
    return tuple(jnp.zeros(shape, dtype) for _ in range(layers))

  return KVCache(
    empty(head_dim, capacity), empty(capacity, head_dim), jnp.zeros((rows,), jnp.int32)
  )


def append(cache: KVCache, new: New, count: jax.Array) -> KVCache:
  """Writes what is new behind each row's length, which grows by `count` [B] of its positions.

  There must be room for T behind the length; those after `count` are written and do not matter.
  """

  def place(axis: int, held: jax.Array, new: jax.Array) -> jax.Array:  # [(L,) B, ...] of both
    def put(row: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
      return jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), start, axis)

    rows = jax.vmap(put)
    rows = jax.vmap(rows, (0, 0, None)) if held.ndim == 5 else rows
    return rows(held, new, cache.length)

  return KVCache(*both(place, cache, new), cache.length + count)


def widen(cache: KVCache, capacity: int) -> KVCache:
  """The same with room for `capacity` positions in each row, at least as many as before."""

  def pad(axis: int, x: jax.Array) -> jax.Array:
    extra = [(0, 0)] * x.ndim
    extra[axis] = (0, capacity - x.shape[axis])
    return jnp.pad(x, extra)

  return KVCache(*both(pad, cache), cache.length)


def unstack(tree: Any, count: int) -> tuple[Any, ...]:
  """A tree of [L, ...] leaves -> L trees of [...] leaves."""
  return tuple(jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count))


def stack(layers: Sequence[jax.Array] | jax.Array) -> jax.Array:
  """Either form -> [L, ...]."""
  return layers if isinstance(layers, jax.Array) else jnp.stack(layers)
