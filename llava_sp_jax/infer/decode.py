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
from jaxtyping import Bool, Float, Int

from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.infer import row_settings, sampling
from llava_sp_jax.infer.row_settings import RowSettings
from llava_sp_jax.infer.sampling import LogProbabilities
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
  """Holds the constants of compiled programs: bounds, beams, and the ids that exist."""

  stop_ids: tuple[int, ...]  # those of the template
  max_new_tokens: int  # room for an answer; a row's own limit is one of its settings
  logits: int  # V of the model
  beams: int = 1  # of a row; 1 without beam search
  vocabulary: int = 0  # ids of the tokenizer, if the model has more; 0: all
  log_probabilities: int | None = (
    None  # likeliest tokens that are kept at each place; None: nothing
  )

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

  def first(self, logits: Float[Array, "R V"], settings: RowSettings) -> Any:
    """Returns the Answers of new rows, of one token, from the logits [R, V] after their prompts."""
    ...

  def modes(self, rows: Any) -> Any:
    """Returns what `choose` must know of all rows; it stays true until other rows are admitted."""
    ...

  def choose(
    self, rows: Any, logits: Float[Array, "B V"], modes: Any
  ) -> tuple[Any, Int[Array, " B"] | None]:
    """Returns new Answers from logits [B, V], and the parents of the sequences or None.

    The parents, int [B], are the sequences that each sequence continues; None means itself.
    """
    ...

  def reorder(self, cache: KVCache, rows: Any, parents: Int[Array, " B"]) -> KVCache:
    """Returns the cache in which each sequence continues its parent."""
    ...


class Choice(NamedTuple):
  """Holds the Answers of rows that have one sequence each, and how their tokens are chosen."""

  token: Int[Array, " R"]
  ids: Int[Array, "R N"]
  made: Int[Array, " R"]
  done: Bool[Array, " R"]
  margin: Float[Array, " R"]
  settings: RowSettings
  log: LogProbabilities


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Implements `Strategy` by greedy decoding or sampling, as each row's settings say."""

  rule: StopRule

  def empty(self, rows: int) -> Choice:
    none, room = jnp.zeros((rows,), jnp.int32), self.rule.max_new_tokens
    return Choice(
      none,
      jnp.zeros((rows, room), jnp.int32),
      none,
      none == 0,
      jnp.full((rows,), jnp.inf, jnp.float32),
      jax.tree.map(jnp.asarray, row_settings.empty(rows, self.rule.logits, room)),
      sampling.log_probabilities(rows, room, self.rule.log_probabilities),
    )

  def first(self, logits: Float[Array, "R V"], settings: RowSettings) -> Choice:
    rows = self.empty(len(logits))
    rows = rows._replace(done=jnp.zeros_like(rows.done), settings=settings)
    return self.choose(rows, logits, self.modes(rows))[0]

  def modes(self, rows: Choice) -> sampling.Modes:
    return sampling.modes(rows.settings, ~rows.done)

  def choose(
    self, rows: Choice, logits: Float[Array, "R V"], modes: sampling.Modes
  ) -> tuple[Choice, None]:
    going, settings, logits = ~rows.done, rows.settings, self.rule.possible(logits)
    edited = jax.lax.cond(
      modes.edited, lambda: sampling.edit(logits, settings, rows.ids, rows.made), lambda: logits
    )
    token = sampling.pick(edited, settings, rows.made, modes.sampled)
    least = jnp.minimum(rows.margin, sampling.margin(edited, token))
    stops = jnp.any(token[:, None] == settings.stop_ids, axis=1)
    counts = going & ~stops
    at = jnp.arange(self.rule.max_new_tokens) == rows.made[:, None]
    made = rows.made + counts
    return Choice(
      token=jnp.where(going, token, rows.token),
      ids=jnp.where(at & counts[:, None], token[:, None], rows.ids),
      made=made,
      done=rows.done | ~counts | (made >= settings.limit),
      margin=jnp.where(going, least, rows.margin),
      settings=settings,
      log=sampling.log(rows.log, logits, token, rows.made, modes.logged),
    ), None

  def reorder(self, cache: KVCache, rows: Choice, parents: Int[Array, " B"]) -> KVCache:
    return cache


def step(module: LlavaSP, params: Any, strategy: Strategy, state: State, modes: Any) -> State:
  """Adds one token to every row that is not done, by one pass of the decoder.

  `modes` are those of the strategy.
  """
  apply: Any = functools.partial(module.apply, {"params": params})  # linen's own type is a union
  cache, token = state.cache, state.rows.token.reshape(-1, 1)
  segments = jnp.full(token.shape, BRANCHES, jnp.int32)
  hidden, new = apply(token, cache.length[:, None], segments, None, None, cache, method="extend")
  going = jnp.repeat(~state.rows.done, strategy.rule.beams).astype(jnp.int32)
  rows, parents = strategy.choose(state.rows, apply(hidden[:, -1], method="logits"), modes)
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
  ended: Bool[Array, " R"],
  steps: Int[Array, ""],
  until: Int[Array, ""],
  *,
  strategy: Strategy,
) -> tuple[State, DecodeReport]:
  """Runs steps until `until` rows are done, but at most `steps`.

  `ended` [R] bool marks rows that the host has ended, for instance at a stop string. `steps` and
  `until` are values, not shapes, so this is compiled once for all of their values.

  Returns: the new state, and what the host needs to know of it.
  """
  state = state._replace(rows=state.rows._replace(done=state.rows.done | ended))
  modes = strategy.modes(state.rows)

  def going(carry: tuple[Int[Array, ""], State]) -> Bool[Array, ""]:
    number, state = carry
    return (number < steps) & (jnp.sum(state.rows.done) < until)

  def once(carry: tuple[Int[Array, ""], State]) -> tuple[Int[Array, ""], State]:
    number, state = carry
    return number + 1, step(module, params, strategy, state, modes)

  number, state = jax.lax.while_loop(going, once, (jnp.zeros((), jnp.int32), state))
  rows = state.rows
  return state, DecodeReport(number, rows.made, rows.done, rows.ids, rows.margin)
