"""From logits to the next token.

Shape letters:  B rows . V vocabulary
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from llava_sp_jax.infer.generation import Generation


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How one token is chosen; hashable, a constant of compiled programs.

  Filters are applied in the order of transformers' warpers: temperature, top_k, top_p.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  @classmethod
  def of(cls, generation: Generation) -> Sampler:
    return cls(generation.temperature, generation.top_k, generation.top_p)

  def pick(
    self, logits: jax.Array, key: jax.Array, numbers: jax.Array, steps: jax.Array
  ) -> jax.Array:
    """[B, V], key, [B], [B] -> tokens [B] int32.

    A sample depends on its request's number and on how many tokens came before it, never on the row
    it stands in nor on what it is batched with.
    """
    if self.temperature == 0.0:
      return first_largest(logits)
    logits = self.filtered(logits)

    def draw(row: jax.Array, number: jax.Array, step: jax.Array) -> jax.Array:
      return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, number), step), row)

    return jax.vmap(draw)(logits, numbers, steps).astype(jnp.int32)

  def filtered(self, logits: jax.Array) -> jax.Array:
    """Logits of the distribution that is drawn from; -inf for what may not be drawn. [B, V]."""
    logits = logits / self.temperature
    if 0 < self.top_k < logits.shape[-1]:
      least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
      logits = jnp.where(logits < least, -jnp.inf, logits)
    if self.top_p < 1.0:
      ordered = jnp.sort(logits, axis=-1)[:, ::-1]
      shares = jax.nn.softmax(ordered, axis=-1)
      before = jnp.cumsum(shares, axis=-1) - shares
      # The likeliest tokens until their sum reaches top_p, the one that reaches it included.
      least = jnp.min(jnp.where(before < self.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
      logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


GREEDY = Sampler()


def first_largest(logits: jax.Array) -> jax.Array:
  """argmax as two plain reductions, several times faster than XLA's own on a CPU. [B, V] -> [B]."""
  top = jnp.max(logits, axis=-1, keepdims=True)
  index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  return jnp.min(jnp.where(logits == top, index, logits.shape[-1] - 1), axis=-1)


def margin(logits: jax.Array, chosen: jax.Array) -> jax.Array:
  """By how much the chosen token leads the best other one; negative if it does not. -> [B]."""
  index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  mine = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
  others = jnp.where(index == chosen[:, None], -jnp.inf, logits)
  return mine - jnp.max(others, axis=-1)
