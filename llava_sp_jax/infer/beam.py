"""Searches with beams, as transformers does by default: length_penalty 1, early_stopping False.

Each row has n running beams. Of the n best candidates of a step, those that end become results. The
score of a result is its log-probability divided by its number of tokens, the end token included. A
row is done when it has n results, none of which scores lower than the best running beam does now.
Source: `_beam_search` in transformers 5, `generation/utils.py`.

Shape letters:  R rows . n beams . C candidates . N new tokens at most . V vocabulary
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Num, Shaped

from llava_sp_jax.infer.decode import StopRule
from llava_sp_jax.infer.row_settings import RowSettings
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.cache import KVCache

WORST = -1e9  # score of an empty place for a beam


class BeamAnswers(NamedTuple):
  """Holds answers, running beams and results of each row; the first five fields are `Answers`."""

  token: Int[Array, "R n"]
  ids: Int[Array, "R N"]  # the best result so far
  made: Int[Array, " R"]  # tokens in `ids`; 0 until the row is done
  done: Bool[Array, " R"]
  margin: Float[Array, " R"]  # score of the best result minus that of the second
  steps: Int[Array, " R"]  # int32, tokens of the running beams
  running: Int[Array, "R n N"]  # int32
  scores: Float[Array, "R n"]  # float32, log-probabilities of the running beams
  ended: Int[Array, "R n N"]  # int32, the results, best first
  ended_made: Int[Array, "R n"]  # int32
  ended_scores: Float[Array, "R n"]  # float32


@dataclasses.dataclass(frozen=True)
class BeamSearch:
  """Implements `decode.Strategy` by beam search with `rule.beams` beams."""

  rule: StopRule

  def empty(self, rows: int) -> BeamAnswers:
    count, longest = self.rule.beams, self.rule.max_new_tokens
    none, each = jnp.zeros((rows,), jnp.int32), jnp.zeros((rows, count), jnp.int32)
    ids = jnp.zeros((rows, count, longest), jnp.int32)
    worst = jnp.full((rows, count), WORST, jnp.float32)
    return BeamAnswers(
      each,
      ids[:, 0],
      none,
      none == 0,
      jnp.full((rows,), jnp.inf, jnp.float32),
      none,
      ids,
      worst,
      ids,
      each,
      worst,
    )

  def first(self, logits: Float[Array, "R V"], settings: RowSettings) -> BeamAnswers:
    """Returns the beams of new rows from the logits [R, V] after their prompts: one token each.

    The prompt is a single beam with log-probability 0. `settings` are not used: beams are searched
    as the rule says.
    """
    rows = self.empty(len(logits))
    rows = rows._replace(done=jnp.zeros_like(rows.done), scores=rows.scores.at[:, 0].set(0.0))
    every = jnp.repeat(logits, self.rule.beams, axis=0)
    return self.choose(rows, every, None)[0]

  def modes(self, rows: BeamAnswers) -> None:
    """Returns None, because all rows are searched alike."""

  def choose(
    self, rows: BeamAnswers, logits: Float[Array, "B V"], modes: None
  ) -> tuple[BeamAnswers, Int[Array, " B"]]:
    """Extends each beam by its best tokens, and returns the new rows and the parent of each beam.

    Rows that are done stay as they are. The parents are int [R n], indices into the beams of all
    rows.
    """
    count, longest = self.rule.beams, self.rule.max_new_tokens
    every, vocabulary = jnp.arange(len(rows.done))[:, None], logits.shape[-1]
    possible = self.rule.possible(logits)
    scores = jax.nn.log_softmax(possible).reshape(-1, count, vocabulary) + rows.scores[..., None]
    # Enough that n of them continue, however many end.
    wanted = max(2, 1 + len(self.rule.stop_ids)) * count
    flat = scores.reshape(len(every), -1)
    best, index = jax.lax.top_k(flat, min(wanted, flat.shape[1]))
    parent, token = index // vocabulary, (index % vocabulary).astype(jnp.int32)
    steps = rows.steps[:, None] + 1
    stops = self.rule.is_stop(token)
    ends = stops | (steps >= longest)
    at = jnp.arange(longest) == rows.steps[:, None, None]
    ids = jnp.where(at, token[..., None], rows.running[every, parent])  # [R, C, N]

    among = jnp.arange(best.shape[1]) < count
    scored = jnp.where(ends & among, best / steps, WORST)
    results = jnp.concatenate([rows.ended_scores, scored], axis=1)
    ended_scores, kept = jax.lax.top_k(results, count)
    made = jnp.concatenate([rows.ended_made, jnp.where(stops, steps - 1, steps)], axis=1)
    ended = jnp.concatenate([rows.ended, ids], axis=1)[every, kept]

    going, chosen = jax.lax.top_k(jnp.where(ends, WORST, best), count)
    full = ended_scores[:, -1] > WORST / 2
    done = full & (ended_scores[:, -1] >= going[:, 0] / steps[:, 0]) | (steps[:, 0] >= longest)
    new = BeamAnswers(
      token=token[every, chosen],
      ids=ended[:, 0],
      made=jnp.where(done, made[every, kept][:, 0], 0),
      done=rows.done | done,
      margin=ended_scores[:, 0] - ended_scores[:, 1] if count > 1 else rows.margin,
      steps=steps[:, 0],
      running=ids[every, chosen],
      scores=going,
      ended=ended,
      ended_made=made[every, kept],
      ended_scores=ended_scores,
    )

    def keep(old: Shaped[Array, " R *n"], new: Shaped[Array, " R *n"]) -> Shaped[Array, " R *n"]:
      return jnp.where(rows.done.reshape(-1, *[1] * (new.ndim - 1)), old, new)

    parents = jnp.where(rows.done[:, None], jnp.arange(count), parent[every, chosen])
    return jax.tree.map(keep, rows, new), (every * count + parents).reshape(-1)

  def reorder(self, cache: KVCache, rows: BeamAnswers, parents: Int[Array, " B"]) -> KVCache:
    """Copies to each beam what its parent has generated.

    The prompt is not copied, because it is the same in all beams of a row.
    """
    start = cache.length - jnp.repeat(rows.steps, self.rule.beams)
    width = min(self.rule.max_new_tokens, cache.capacity)

    def move(axis: int, x: Num[Array, "*LB K S H"]) -> Num[Array, "*LB K S H"]:
      cut: Callable[..., jax.Array] = jax.vmap(
        lambda x, at: jax.lax.dynamic_slice_in_dim(x, at, width, axis)
      )
      put: Callable[..., jax.Array] = jax.vmap(
        lambda x, new, at: jax.lax.dynamic_update_slice_in_dim(x, new, at, axis)
      )
      return put(x, cut(x, start)[parents], start)

    return KVCache(*cache_lib.both(move, cache), cache.length)
