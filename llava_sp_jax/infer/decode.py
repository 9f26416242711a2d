"""Runs the decode step in a loop on the device; each row ends on its own and waits to be refilled.

Shape letters:  R rows, one for each answer . n beams of a row, 1 without beam search . B = R n
                N new tokens at most . V vocabulary
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.infer.sampling import GREEDY, Sampler, margin
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.cache import KVCache
from llava_sp_jax.models.llava import LlavaSP


@runtime_checkable
class Answers(Protocol):
  """Declares what every sampling strategy holds for each row; a row that is `done` is free."""

  token: Int[Array, " R *n"]  # int32, chosen but not yet in the cache
  ids: Int[Array, "R N"]  # int32, the answer so far
  made: Int[Array, " R"]  # int32, tokens of the answer
  done: Bool[Array, " R"]
  margin: Float[Array, " R"]  # float32, the smallest lead of a chosen token over the next best one


class State(NamedTuple):
  """Holds everything that decoding keeps on the device: the cache, and the answer of each row."""

  cache: KVCache  # of B sequences
  rows: Any  # Answers, every array [R, ...]


class DecodeReport(NamedTuple):
  """Holds what the host reads after some steps; [R, ...] arrays are those of `Answers`."""

  steps: Any  # [] int32, steps that were run
  made: Any  # this field and the next three are those of Answers
  done: Any
  ids: Any
  margin: Any


@dataclasses.dataclass(frozen=True)
class StopRule:
  """Says when an answer ends, and how a token is drawn; a constant of compiled programs."""

  stop_ids: tuple[int, ...]
  max_new_tokens: int
  sampler: Sampler = GREEDY
  beams: int = 1  # of a row; 1 without beam search
  vocabulary: int = 0  # ids of the tokenizer, if the model has more; 0: all

  def possible(self, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """Sets the logits of ids that the tokenizer lacks to -inf.

    Such ids are padding rows of an embedding.
    """
    if not 0 < self.vocabulary < logits.shape[-1]:
      return logits
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(index < self.vocabulary, logits, -jnp.inf)

  def is_stop(self, token: Int[Array, "*B"]) -> Bool[Array, "*B"]:
    """Returns whether each token is a stop id, as bool of the same shape."""
    return jnp.isin(token, jnp.asarray(self.stop_ids, jnp.int32))


@runtime_checkable
class Strategy(Protocol):
  """Declares how tokens are chosen; `Sampling` and `beam.BeamSearch` implement it."""

  @property
  def rule(self) -> StopRule: ...

  def empty(self, rows: int) -> Any:
    """Returns `Answers` of `rows` rows that are all done, so free."""
    ...

  def first(self, logits: Float[Array, "R V"], numbers: Int[Array, " R"], key: PRNGKeyArray) -> Any:
    """Returns the Answers of new rows, of one token, from the logits [R, V] after their prompts.

    `numbers` [R] are those of their requests, which seed samples together with `key`.
    """
    ...

  def choose(
    self, rows: Any, logits: Float[Array, "B V"], key: PRNGKeyArray
  ) -> tuple[Any, Int[Array, " B"] | None]:
    """Returns new Answers from logits [B, V], and the parents of the sequences or None.

    The parents, int [B], are the sequences that each sequence continues; None means itself. `key`
    seeds samples.
    """
    ...

  def reorder(self, cache: KVCache, rows: Any, parents: Int[Array, " B"]) -> KVCache:
    """Returns the cache in which each sequence continues its parent."""
    ...


class Choice(NamedTuple):
  """Holds the Answers of rows that have one sequence each."""

  token: Int[Array, " R"]
  ids: Int[Array, "R N"]
  made: Int[Array, " R"]
  done: Bool[Array, " R"]
  margin: Float[Array, " R"]
  number: Int[Array, " R"]  # int32, number of the request, which seeds its samples


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Implements `Strategy` by greedy decoding or sampling."""

  rule: StopRule

  def empty(self, rows: int) -> Choice:
    none = jnp.zeros((rows,), jnp.int32)
    ids = jnp.zeros((rows, self.rule.max_new_tokens), jnp.int32)
    return Choice(none, ids, none, none == 0, jnp.full((rows,), jnp.inf, jnp.float32), none)

  def first(
    self, logits: Float[Array, "R V"], numbers: Int[Array, " R"], key: PRNGKeyArray
  ) -> Choice:
    rows = self.empty(len(logits))
    rows = rows._replace(done=jnp.zeros_like(rows.done), number=numbers)
    return self.choose(rows, logits, key)[0]

  def choose(
    self, rows: Choice, logits: Float[Array, "R V"], key: PRNGKeyArray
  ) -> tuple[Choice, None]:
    going, logits = ~rows.done, self.rule.possible(logits)
    token = self.rule.sampler.pick(logits, key, rows.number, rows.made)
    least = jnp.minimum(rows.margin, margin(logits, token))
    counts = going & ~self.rule.is_stop(token)
    at = jnp.arange(self.rule.max_new_tokens) == rows.made[:, None]
    made = rows.made + counts
    return Choice(
      token=jnp.where(going, token, rows.token),
      ids=jnp.where(at & counts[:, None], token[:, None], rows.ids),
      made=made,
      done=rows.done | ~counts | (made >= self.rule.max_new_tokens),
      margin=jnp.where(going, least, rows.margin),
      number=rows.number,
    ), None

  def reorder(self, cache: KVCache, rows: Choice, parents: Int[Array, " B"]) -> KVCache:
    return cache


def step(
  module: LlavaSP, params: Any, strategy: Strategy, state: State, key: PRNGKeyArray
) -> State:
  """Adds one token to every row that is not done, by one pass of the decoder.

  `key` seeds samples.
  """
  apply: Any = functools.partial(module.apply, {"params": params})  # linen's own type is a union
  cache, token = state.cache, state.rows.token.reshape(-1, 1)
  segments = jnp.full(token.shape, BRANCHES, jnp.int32)
  hidden, new = apply(token, cache.length[:, None], segments, None, None, cache, method="extend")
  going = jnp.repeat(~state.rows.done, strategy.rule.beams).astype(jnp.int32)
  rows, parents = strategy.choose(state.rows, apply(hidden[:, -1], method="logits"), key)
  # This adds 0, because no token is negative, but the compiler cannot know that. So the write must
  # follow all reads of the cache, and needs no copy of it. (On CPU, XLA drops optimization_barrier
  # before it decides on copies.)
  length = cache.length + jnp.minimum(jnp.min(rows.token), 0)
  cache = cache_lib.append(cache._replace(length=length), new, going)
  return State(cache if parents is None else strategy.reorder(cache, state.rows, parents), rows)


def decode(
  module: LlavaSP,
  params: Any,
  state: State,
  key: PRNGKeyArray,
  ended: Bool[Array, " R"],
  steps: Int[Array, ""],
  until: Int[Array, ""],
  *,
  strategy: Strategy,
) -> tuple[State, DecodeReport]:
  """Runs steps until `until` rows are done, but at most `steps`.

  `ended` [R] bool marks rows that the host has ended, for instance at a stop string. `key` seeds
  samples. `steps` and `until` are values, not shapes, so this is compiled once for all of their
  values.

  Returns: the new state, and what the host needs to know of it.
  """
  state = state._replace(rows=state.rows._replace(done=state.rows.done | ended))

  def going(carry: tuple[Int[Array, ""], State]) -> Bool[Array, ""]:
    number, state = carry
    return (number < steps) & (jnp.sum(state.rows.done) < until)

  def once(carry: tuple[Int[Array, ""], State]) -> tuple[Int[Array, ""], State]:
    number, state = carry
    return number + 1, step(module, params, strategy, state, key)

  number, state = jax.lax.while_loop(going, once, (jnp.zeros((), jnp.int32), state))
  rows = state.rows
  return state, DecodeReport(number, rows.made, rows.done, rows.ids, rows.margin)
