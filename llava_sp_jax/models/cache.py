"""Holds the key-value cache, which the decoder reads and its caller writes.

New keys and values are written once for all layers, into a donated buffer, so a step copies none of
the old ones. Keys are stored transposed, so that both products of attention read contiguous memory.
What is written is held in one of a table of formats: as it was computed, or as int8.

Shape letters:  L layers . B rows . S capacity . T new positions . K key-value heads . H head width
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Int, Int8, Num, Shaped

from llava_sp_jax.models.arrays import Array

Layers = Any  # [L, ...] for stacked layers, otherwise a tuple of L arrays [...]
POSITION_AXES = (-1, -2)  # axis of the positions in keys and in values


class Codes(NamedTuple):
  """Holds keys or values as code * scale, with one scale for each head of each position.

  Both arrays have the axes of the keys or values that they stand for, in the same order.
  """

  codes: Int8[Array, "*LB K S H"]  # from -127 to 127
  scale: Float32[Array, "*LB K S H"]  # size 1 along the head width


HeldKeys = Float[Array, "*LB K H S"] | Codes
HeldValues = Float[Array, "*LB K S H"] | Codes


def quantize(x: Float[Array, "*LB K S H"], axis: int) -> Codes:
  """Quantizes keys or values symmetrically; `axis` is that of the head width."""
  wide = x.astype(jnp.float32)
  top = jnp.max(jnp.abs(wide), axis=axis, keepdims=True)
  scale = jnp.where(top > 0, top * (1 / 127), 1)
  return Codes(jnp.rint(wide / scale).astype(jnp.int8), scale)


# Rows of model.cache: how (keys or values, axis of the head width) are held.
FLOAT = "float"
FORMATS: dict[str, Callable[..., Any]] = {FLOAT: lambda x, axis: x, "int8": quantize}


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
    result: int = jax.tree.leaves(self.values)[0].shape[-2]
    return result


class New(NamedTuple):
  """Holds the keys and values of T new positions of each row, not yet written to a cache."""

  keys: Layers  # [B, K, H, T] for each layer
  values: Layers  # [B, K, T, H] for each layer


def both(change: Callable[..., Any], *held: Any) -> tuple[Any, Any]:
  """Applies `change(axis, *arrays)` to the keys, and to the values, of every layer.

  `axis` is that of the positions. Each of `held` is a tuple that begins with keys and values, such
  as a `KVCache`, all in the same format; codes and scales are changed in turn. Returns the new keys
  and values.
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
  form: str = FLOAT,
) -> KVCache:
  """Returns a cache of zeros with length 0 in all rows; a prompt starts from one with capacity 0.

  `stacked` makes one array [L, ...] for all layers; otherwise each layer has its own array. `form`
  is a row of FORMATS.
  """

  def empty(axis: int, *sizes: int) -> Layers:
    shape = (layers,) * stacked + (rows, kv_heads, *sizes)
    held = jax.eval_shape(
      functools.partial(FORMATS[form], axis=axis), jax.ShapeDtypeStruct(shape, dtype)
    )
    one = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), held)
    return one() if stacked else tuple(one() for _ in range(layers))

  return KVCache(
    empty(-2, head_dim, capacity), empty(-1, capacity, head_dim), jnp.zeros((rows,), jnp.int32)
  )


def held_as(cache: KVCache, pair: Any) -> New:
  """Returns keys and values in the format of those in `cache`.

  `pair` is a tuple that begins with float keys and values, such as `New`.
  """

  def convert(axis: int, held: Any, x: Float[Array, "*LB K T J"]) -> Any:
    return quantize(x, axis) if isinstance(held, Codes) else x

  keys, values = (
    jax.tree.map(
      functools.partial(convert, axis), held, x, is_leaf=lambda held: isinstance(held, Codes)
    )
    for axis, held, x in ((-2, cache.keys, pair[0]), (-1, cache.values, pair[1]))
  )
  return New(keys, values)


def append(cache: KVCache, new: New, count: Int[Array, " B"]) -> KVCache:
  """Writes new positions behind each row's length, and adds `count` [B] to the lengths.

  A row needs room for all T positions behind its length. Those beyond `count`, its padding, are
  written, too, but the length leaves them out. The new ones are floats, and are quantized if the
  cache is.
  """

  def place(
    axis: int, held: Num[Array, "*LB K S H"], new: Num[Array, "*LB K T J"]
  ) -> Num[Array, "*LB K S H"]:
    def put(
      row: Num[Array, "K S H"], new: Num[Array, "K T J"], start: Int[Array, ""]
    ) -> Num[Array, "K S H"]:
      return jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), start, axis)

    rows = jax.vmap(put)
    rows = jax.vmap(rows, (0, 0, None)) if held.ndim == 5 else rows
    return rows(held, new, cache.length)

  return KVCache(*both(place, cache, held_as(cache, new)), cache.length + count)


def widen(cache: KVCache, capacity: int) -> KVCache:
  """Returns the cache with room for `capacity` positions in each row, no fewer than before."""

  def pad(axis: int, x: Num[Array, "*LB K S H"]) -> Num[Array, "*LB K U J"]:
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
