"""Chooses the next token of each row from logits, as the row's own settings say.

Shape letters:  R rows . V vocabulary . N tokens of an answer at most . n likeliest tokens
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from llava_sp_jax.infer.row_settings import RowSettings
from llava_sp_jax.models.arrays import Array


class Modes(NamedTuple):
  """Says what at least one row needs; where none does, nothing is computed for it."""

  edited: Bool[Array, ""]  # its logits are changed
  sampled: Bool[Array, ""]  # its tokens are drawn
  logged: Bool[Array, ""]  # log-probabilities are reported


def modes(settings: RowSettings, going: Bool[Array, " R"]) -> Modes:
  """Returns what the rows need that are `going` [R] bool."""
  edited = (
    (settings.least > 0)
    | (settings.presence != 0)
    | (settings.frequency != 0)
    | (settings.repetition != 1)
    | jnp.any(settings.biased >= 0, axis=1)
  )
  each = (edited, settings.temperature > 0, settings.logged)
  return Modes(*(jnp.any(wanted & going) for wanted in each))


def edit(
  logits: Float[Array, "R V"],
  settings: RowSettings,
  ids: Int[Array, "R N"],
  made: Int[Array, " R"],
) -> Float[Array, "R V"]:
  """Applies biases, penalties and the least number of tokens.

  `ids` [R, N] are the answers so far, of `made` [R] tokens. Rows without such settings keep their
  logits. Source of the penalties: OpenAI's documentation of presence and frequency penalty; Keskar
  et al. 2019 (CTRL), section 4.1, for repetition.
  """
  every, vocabulary = jnp.arange(len(logits))[:, None], logits.shape[-1]

  def places(ids: Int[Array, "R K"]) -> Int[Array, "R K"]:
    return jnp.where(ids >= 0, ids, vocabulary)  # writes there are dropped

  logits = logits.at[every, places(settings.biased)].add(settings.bias, mode="drop")
  written = jnp.where(jnp.arange(ids.shape[1]) < made[:, None], ids, vocabulary)
  count = jnp.zeros(logits.shape, jnp.float32).at[every, written].add(1.0, mode="drop")
  prompt = jnp.unpackbits(settings.prompt, axis=1, count=vocabulary).astype(bool)
  factor = settings.repetition[:, None]
  repeated = jnp.where(logits > 0, logits / factor, logits * factor)
  logits = jnp.where((prompt | (count > 0)) & (factor != 1), repeated, logits)
  logits -= settings.presence[:, None] * (count > 0) + settings.frequency[:, None] * count
  early = jnp.where(made < settings.least, 0.0, vocabulary)[:, None].astype(jnp.int32)
  stops = jnp.maximum(places(settings.stop_ids), early)  # past the end unless it is too early
  return logits.at[every, stops].set(-jnp.inf, mode="drop")


def pick(
  logits: Float[Array, "R V"],
  settings: RowSettings,
  made: Int[Array, " R"],
  sampled: Bool[Array, ""],
) -> Int[Array, " R"]:
  """Chooses the next token of each row. -> [R] int32.

  The sample of a row depends on its logits, its seed and number, and how many tokens it has `made`
  [R]. It does not depend on the place of the row or on the other rows. A row with temperature 0
  takes the most likely token. Nothing is drawn unless `sampled`.
  """

  def draw() -> Int[Array, " R"]:
    def one(
      row: Float[Array, " V"], key: Array, number: Int[Array, ""], step: Int[Array, ""]
    ) -> Int[Array, ""]:
      key = jax.random.fold_in(jax.random.wrap_key_data(key), number)
      return jax.random.categorical(jax.random.fold_in(key, step), row)

    drawn = jax.vmap(one)(filtered(logits, settings), settings.key, settings.number, made)
    return jnp.where(settings.temperature > 0, drawn.astype(jnp.int32), first_largest(logits))

  chosen: Array = jax.lax.cond(sampled, draw, lambda: first_largest(logits))
  return chosen


def filtered(logits: Float[Array, "R V"], settings: RowSettings) -> Float[Array, "R V"]:
  """Divides logits by the temperature, and sets those of excluded tokens to -inf.

  Excludes by top_k, top_p and min_p, in the order of transformers' warpers. A row with temperature
  0 has no meaning here.
  """
  temperature = jnp.where(settings.temperature > 0, settings.temperature, 1.0)
  logits = logits / temperature[:, None]
  ordered = jnp.sort(logits, axis=-1)[:, ::-1]
  count = jnp.where(settings.top_k > 0, settings.top_k, logits.shape[-1])
  last = jnp.clip(count - 1, 0, logits.shape[-1] - 1)[:, None]
  least = jnp.take_along_axis(ordered, last, axis=-1)
  ordered = jnp.where(ordered < least, -jnp.inf, ordered)
  shares = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(shares, axis=-1) - shares
  # Keeps the likeliest tokens until their sum reaches top_p, and the one that reaches it.
  top_p = settings.top_p[:, None]
  kept = (before < top_p) | (top_p >= 1)
  least = jnp.maximum(least, jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True))
  least = jnp.maximum(least, ordered[:, :1] + jnp.log(settings.min_p)[:, None])
  return jnp.where(logits < least, -jnp.inf, logits)


def first_largest(logits: Float[Array, "R V"]) -> Int[Array, " R"]:
  """Returns the index of the largest logit, the first of equal ones. [R, V] -> [R] int32.

  Two plain reductions are several times faster than XLA's argmax on a CPU.
  """
  top = jnp.max(logits, axis=-1, keepdims=True)
  index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  return jnp.min(jnp.where(logits == top, index, logits.shape[-1] - 1), axis=-1)


def margin(logits: Float[Array, "R V"], chosen: Int[Array, " R"]) -> Float[Array, " R"]:
  """Returns the logit of the chosen token minus that of the best other one. [R, V], [R] -> [R].

  It is negative if another token has a larger logit.
  """
  index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  mine = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
  others = jnp.where(index == chosen[:, None], -jnp.inf, logits)
  return mine - jnp.max(others, axis=-1)


class LogProbabilities(NamedTuple):
  """Holds log-probabilities (natural logarithm) of the tokens of answers, before any setting."""

  chosen: Float[Array, "R N"]  # float32; N is 0 where none are kept, like n
  top_ids: Int[Array, "R N n"]  # int32, the likeliest tokens at each place, best first
  top: Float[Array, "R N n"]  # float32


def log_probabilities(rows: int, tokens: int, top: int | None) -> LogProbabilities:
  """Returns room for answers of at most `tokens`, with `top` likeliest ones; None keeps nothing."""
  shape = (rows, tokens, top) if top is not None else (rows, 0, 0)
  return LogProbabilities(
    jnp.zeros(shape[:2], jnp.float32), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)
  )


def log(
  held: LogProbabilities,
  logits: Float[Array, "R V"],
  chosen: Int[Array, " R"],
  made: Int[Array, " R"],
  logged: Bool[Array, ""],
) -> LogProbabilities:
  """Writes the log-probabilities of the `chosen` tokens [R] at their places `made` [R].

  Nothing is computed unless `logged`. `logits` are those of the model, before any setting.
  """
  count = held.top.shape[2]
  if not held.chosen.shape[1]:
    return held

  def write() -> LogProbabilities:
    values = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    mine = jnp.take_along_axis(values, chosen[:, None], axis=-1)[:, 0]
    top, ids = jax.lax.top_k(values, count)
    every = jnp.arange(len(made))
    new = (mine, ids.astype(jnp.int32), top)
    return LogProbabilities(
      *(x.at[every, made].set(n, mode="drop") for x, n in zip(held, new, strict=True))
    )

  result: LogProbabilities = jax.lax.cond(logged, write, lambda: held)
  return result
