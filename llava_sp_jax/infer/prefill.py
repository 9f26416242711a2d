"""Prefills prompts in pieces: shared prefixes are computed once, and the rest is appended to them.

Shape letters:  L layers . G rows of a group . T new positions . P capacity of a prefix . M tiles
                N tokens per tile . D width . K key-value heads . H head width
                n beams . B sequences of the decode state
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Num

from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.infer import decode
from llava_sp_jax.infer.row_settings import RowSettings
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.models import shares
from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.cache import KVCache, New
from llava_sp_jax.models.llava import LlavaSP


class Prefix(NamedTuple):
  """Holds the keys and values of the first positions of prompts, which several prompts share."""

  keys: Float[Array, "L K H P"]
  values: Float[Array, "L K P H"]


class Group(NamedTuple):
  """Holds new positions of G prompts, right-padded, that follow `start` positions of a prefix each.

  `tiles` are those that the new positions show.
  """

  tokens: Int[Any, "G T"]  # int32, on the host or a device, like the next three
  slots: Int[Any, "G T"]  # int32, -1 for text, otherwise an index into the tokens of the tiles
  length: Int[Any, " G"]  # int32, positions that are not padding
  start: Int[Any, " G"]  # int32, positions in the prefixes
  prefixes: tuple[Prefix, ...]  # one for each row, or none
  tiles: tuple[tuple[Float[Array, "N D"], ...], ...]  # M arrays for each row, or none


def _extend(
  module: LlavaSP, params: Any, group: Group
) -> tuple[Float[Array, "G T D"], New, KVCache]:
  """Returns hidden states, the new keys and values, and the stacked prefixes."""
  apply: Any = functools.partial(module.apply, {"params": params})
  text, (rows, count) = module.language_model, group.tokens.shape
  past = cache_lib.allocate(
    text.layers, rows, 0, text.kv_heads, text.head_dim, text.dtype, text.stacked
  )
  if group.prefixes:
    keys, values = (
      tuple(jnp.stack([getattr(p, name)[i] for p in group.prefixes]) for i in range(text.layers))
      for name in ("keys", "values")
    )
    past = KVCache(keys, values, group.start)
  image = None
  if group.tiles:
    image = apply(jnp.stack([jnp.stack(row) for row in group.tiles]), method="join_tiles")
  index = jnp.arange(count)
  segments = jnp.where(index < group.length[:, None], BRANCHES, 0)
  positions = jnp.where(segments > 0, group.start[:, None] + index, 0)
  hidden, new = apply(group.tokens, positions, segments, image, group.slots, past, method="extend")
  return hidden, new, past


def grow(module: LlavaSP, params: Any, group: Group, *, capacity: int) -> tuple[Prefix, ...]:
  """Prefills new positions of G prompts, and returns the prefix of each with them.

  `capacity` is the P of the results.
  """
  _, new, past = _extend(module, params, group)
  room = max(capacity, past.capacity + group.tokens.shape[1])
  whole = cache_lib.append(cache_lib.widen(past, room), new, group.length)

  def cut(axis: int, x: Float[Array, "*LB K S H"]) -> Float[Array, "*LB K P J"]:
    return jax.lax.slice_in_dim(x, 0, capacity, axis=axis)

  keys, values = map(cache_lib.stack, cache_lib.both(cut, whole))
  return tuple(Prefix(keys[:, g], values[:, g]) for g in range(len(group.tokens)))


def admit(
  module: LlavaSP,
  params: Any,
  state: decode.State,
  group: Group,
  rows: Int[Array, " G"],
  settings: RowSettings,
  *,
  strategy: decode.Strategy,
) -> decode.State:
  """Prefills G prompts into `rows` [G] of the state, and chooses the first token of each.

  `settings` are those of the G prompts. A prompt is written only on the device that prefills it: row
  r of the state and prompt g need the same device (`Rows.deal`). A prompt whose row the state does
  not have, such as one past its end, is padding and not written.
  """
  hidden, new, past = _extend(module, params, group)
  last = jnp.take_along_axis(hidden, (group.length - 1)[:, None, None], axis=1)[:, 0]
  logits: Any = module.apply({"params": params}, last, method="logits")
  first = strategy.first(logits, settings)
  before, after = (cache_lib.held_as(state.cache, part) for part in (past, new))
  write = functools.partial(_write, strategy.rule.beams)
  arguments = (state, first, before, after, group.start, group.length, rows)
  if jax.sharding.get_abstract_mesh().empty:
    return write(jnp.int32(0), *arguments)
  row, head = shares.specs(module.language_model.kv_heads)
  cache: Any = (head, head, row)
  kept, part = decode.State(KVCache(*cache), row), New(head, head)

  def local(*own: Any) -> decode.State:
    return write(shares.part_of_rows(), *own)

  divided = jax.shard_map(
    local, in_specs=(kept, row, part, part, row, row, row), out_specs=kept, check_vma=False
  )
  result: decode.State = divided(*arguments)
  return result


def _write(
  beams: int,
  part: Int[Array, ""],
  state: decode.State,
  first: Any,
  before: New,
  after: New,
  start: Int[Array, " G"],
  length: Int[Array, " G"],
  rows: Int[Array, " G"],
) -> decode.State:
  """Writes G prompts and their first tokens into those of `rows` that this part of the state has.

  Args:
    beams: n, sequences of a row.
    part: which part of all rows the state holds, from 0.
    state: that part, B sequences.
    first: the Answers of the prompts, [G, ...].
    before: keys and values of the prefixes, P positions, in the cache's format.
    after: those of the T positions behind the prefixes.
    start: the positions of each prefix.
    length: the positions behind each prefix, without padding.
    rows: the rows of all devices into which the prompts are written.
  """
  held = len(state.rows.done)
  own = rows - part * held
  valid = (own >= 0) & (own < held)
  own = jnp.where(valid, own, held)  # dropped below
  sequences = own[:, None] * beams + jnp.arange(beams, dtype=own.dtype)

  def once(i: Int[Array, ""], kept: KVCache) -> KVCache:
    g, sequence = i // beams, sequences[i // beams, i % beams]

    def put(
      axis: int,
      kept: Num[Array, "B K S H"],
      given: Num[Array, "G K T J"],
      at: Int[Array, ""] | int,
    ) -> Num[Array, "B K S H"]:
      new = jax.lax.dynamic_index_in_dim(given, g, keepdims=True).astype(kept.dtype)
      where = [sequence] + [jnp.zeros((), sequence.dtype)] * (kept.ndim - 1)
      where[axis] = jnp.asarray(at, sequence.dtype)
      old = jax.lax.dynamic_slice(kept, where, new.shape)
      return jax.lax.dynamic_update_slice(kept, jnp.where(valid[g], new, old), where)

    def fill(
      axis: int,
      kept: Num[Array, "B K S H"],
      prefix: Num[Array, "G K P J"],
      new: Num[Array, "G K T I"],
    ) -> Num[Array, "B K S H"]:
      kept = put(axis, kept, prefix, 0) if prefix.shape[axis] else kept
      return put(axis, kept, new, start[g])

    return KVCache(*cache_lib.both(fill, kept, before, after), kept.length)

  # A loop over the sequences keeps the program short.
  cache: KVCache = jax.lax.fori_loop(0, sequences.size, once, state.cache)
  filled = cache.length.at[sequences].set((start + length)[:, None], mode="drop")
  answers = jax.tree.map(lambda kept, x: kept.at[own].set(x, mode="drop"), state.rows, first)
  return decode.State(cache._replace(length=filled), answers)
