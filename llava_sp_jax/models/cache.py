"""Holds the key-value cache, which the decoder reads and its caller writes.

New keys and values are written once for all layers, into a donated buffer, so a step copies none of
the old ones. Keys are stored transposed, so that both products of attention read contiguous memory.

Shape letters:  L layers . B rows . S capacity . T new positions . K key-value heads . H head width
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Int, Shaped

from llava_sp_jax.models.arrays import Array

Layers = Any  # [L, ...] for stacked layers, otherwise a tuple of L arrays [...]
POSITION_AXES = (-1, -2)  # axis of the positions in keys and in values


class KVCache(NamedTuple):
  """Holds keys and values of the first `length[b]` positions of each row b.

  The buffers have room for S positions in every row, the capacity. Attention masks what lies behind
  a row's length.
  """

  keys: Layers  # [B, K, H, S] for each layer
  values: Layers  # [B, K, S, H] for each layer
  length: Int[Array, " B"]  # int32

  @property
  def capacity(self) -> int:
    """Returns S, the number of positions that the buffers of each row have room for."""
    result: int = self.values[0].shape[-2]
    return result


class New(NamedTuple):
  """Holds the keys and values of T new positions of each row, not yet written to a cache."""

  keys: Layers  # [B, K, H, T] for each layer
  values: Layers  # [B, K, T, H] for each layer


def both(change: Callable[..., Any], *held: Any) -> tuple[Any, Any]:
  """Applies `change(axis, *arrays)` to the keys, and to the values, of every layer.

  `axis` is that of the positions. Each of `held` is a tuple that begins with keys and values, such
  as a `KVCache`. Returns the new keys and values.
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
  dtype: DTypeLike,
  stacked: bool = True,
) -> KVCache:
  """Returns a cache of zeros with length 0 in all rows; a prompt starts from one with capacity 0.

  `stacked` makes one array [L, ...] for all layers; otherwise each layer has its own array.
  """

  def empty(*sizes: int) -> Layers:
    shape = (rows, kv_heads, *sizes)
    if stacked:
      return jnp.zeros((layers, *shape), dtype)
    return tuple(jnp.zeros(shape, dtype) for _ in range(layers))

  return KVCache(
    empty(head_dim, capacity), empty(capacity, head_dim), jnp.zeros((rows,), jnp.int32)
  )


def append(cache: KVCache, new: New, count: Int[Array, " B"]) -> KVCache:
  """Writes new positions behind each row's length, and adds `count` [B] to the lengths.

  A row needs room for all T positions behind its length. Those beyond `count`, its padding, are
  written, too, but the length leaves them out.
  """

  def place(
    axis: int, held: Float[Array, "*LB K S H"], new: Float[Array, "*LB K T J"]
  ) -> Float[Array, "*LB K S H"]:
    def put(
      row: Float[Array, "K S H"], new: Float[Array, "K T J"], start: Int[Array, ""]
    ) -> Float[Array, "K S H"]:
      return jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), start, axis)

    rows = jax.vmap(put)
    rows = jax.vmap(rows, (0, 0, None)) if held.ndim == 5 else rows
    return rows(held, new, cache.length)

  return KVCache(*both(place, cache, new), cache.length + count)


def widen(cache: KVCache, capacity: int) -> KVCache:
  """Returns the cache with room for `capacity` positions in each row, no fewer than before."""

  def pad(axis: int, x: Float[Array, "*LB K S H"]) -> Float[Array, "*LB K U J"]:
    extra = [(0, 0)] * x.ndim
    extra[axis] = (0, capacity - x.shape[axis])
    return jnp.pad(x, extra)

  return KVCache(*both(pad, cache), cache.length)


def unstack(tree: Any, count: int) -> tuple[Any, ...]:
  """Splits a tree of arrays [L, ...] into `count` = L trees of arrays [...]."""
  return tuple(jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count))


def stack(
  layers: Sequence[Shaped[Array, "*B"]] | Shaped[Array, " L *B"],
) -> Shaped[Array, " L *B"]:
  """Stacks the arrays of L layers, [...], into one [L, ...]; returns a stacked array as it is."""
  return layers if isinstance(layers, jax.Array) else jnp.stack(layers)
