"""The one decode step, in a loop on the device: rows end by themselves and wait to be refilled.

Shape letters:  B rows . N new tokens at most . V vocabulary . D width
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llava_sp_jax.data.example import BRANCHES
from llava_sp_jax.infer.sampling import GREEDY, Sampler, margin
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.models.cache import KVCache
from llava_sp_jax.models.llava import LlavaSP


class State(NamedTuple):
  """All that decoding keeps on the device. A row that is `done` is free."""

  cache: KVCache
  token: jax.Array  # [B] int32, chosen and not yet in the cache
  ids: jax.Array  # [B, N] int32, the answer so far
  made: jax.Array  # [B] int32, how many of them count
  done: jax.Array  # [B] bool
  number: jax.Array  # [B] int32, of the request: what samples are drawn by
  margin: jax.Array  # [B] float32, the smallest lead of a chosen token over the next best


@dataclasses.dataclass(frozen=True)
class Rule:
  """What is chosen and when an answer is over; a constant of compiled programs."""

  stop_ids: tuple[int, ...]
  max_new_tokens: int
  sampler: Sampler = GREEDY

  def is_stop(self, token: jax.Array) -> jax.Array:
    return jnp.isin(token, jnp.asarray(self.stop_ids, jnp.int32))


def empty(cache: KVCache, rule: Rule) -> State:
  """All rows free."""
  rows = cache.length.shape
  return State(
    cache, jnp.zeros(rows, jnp.int32), jnp.zeros((*rows, rule.max_new_tokens), jnp.int32),
    jnp.zeros(rows, jnp.int32), jnp.ones(rows, bool), jnp.zeros(rows, jnp.int32),
    jnp.full(rows, jnp.inf, jnp.float32),
  )  # fmt: skip


def choose(rule: Rule, state: State, logits: jax.Array, key: jax.Array) -> State:
  """Takes the next token of every row that goes on. logits [B, V]."""
  going = ~state.done
  token = rule.sampler.pick(logits, key, state.number, state.made)
  least = jnp.minimum(state.margin, margin(logits, token))
  counts = going & ~rule.is_stop(token)
  at = jnp.arange(rule.max_new_tokens) == state.made[:, None]
  made = state.made + counts
  return state._replace(
    token=jnp.where(going, token, state.token),
    ids=jnp.where(at & counts[:, None], token[:, None], state.ids),
    made=made,
    done=state.done | ~counts | (made >= rule.max_new_tokens),
    margin=jnp.where(going, least, state.margin),
  )


def step(module: LlavaSP, params: Any, rule: Rule, state: State, key: jax.Array) -> State:
  """One more token for every row that is not done."""
  apply: Any = functools.partial(module.apply, {"params": params})  # linen's own type is a union
  cache = state.cache
  segments = jnp.full((len(state.token), 1), BRANCHES, jnp.int32)
  hidden, new = apply(
    state.token[:, None], cache.length[:, None], segments, None, None, cache, method="extend"
  )
  logits = apply(hidden[:, -1], method="logits")
  state = state._replace(cache=cache_lib.append(cache, new, (~state.done).astype(jnp.int32)))
  return choose(rule, state, logits, key)


def decode(
  module: LlavaSP, params: Any, state: State, key: jax.Array, ended: jax.Array, steps: jax.Array,
  until: jax.Array, *, rule: Rule,
) -> tuple[State, jax.Array]:  # fmt: skip
  """Steps until `until` rows are done, at most `steps`. Returns the state and how many they were.

  `ended` [B] bool are rows that the host has ended, at a stop string say. Both bounds are values,
  not shapes: however many rows the host waits for, this is compiled once.
  """
  state = state._replace(done=state.done | ended)

  def going(carry: tuple[jax.Array, State]) -> jax.Array:
    number, state = carry
    return (number < steps) & (jnp.sum(state.done) < until)

  def once(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
    number, state = carry
    return number + 1, step(module, params, rule, state, key)

  number, state = jax.lax.while_loop(going, once, (jnp.zeros((), jnp.int32), state))
  return state, number
