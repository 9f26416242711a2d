"""Chooses the next token from logits.

Shape letters:  B rows . V vocabulary
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PRNGKeyArray

from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.models.arrays import Array


@dataclasses.dataclass(frozen=True)
class Sampler:
  """Chooses one token; hashable, so that it is a constant of compiled programs.

  Filters are applied in the order of transformers' warpers: temperature, top_k, top_p.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0

  @classmethod
  def of(cls, generation: Generation) -> Sampler:
    """Returns the sampler with the temperature, top_k and top_p of `generation`."""
    return cls(generation.temperature, generation.top_k, generation.top_p)

  def pick(
    self,
    logits: Float[Array, "B V"],
    key: PRNGKeyArray,
    numbers: Int[Array, " B"],
    steps: Int[Array, " B"],
  ) -> Int[Array, " B"]:
    """Chooses the next token of each row.

    Args:
      logits: [B, V].
      key: random key of the whole run; not used if `temperature` is 0.
      numbers: [B] int32, the number of each row's request.
      steps: [B] int32, how many tokens each row's answer has already.

    A row's sample depends on its logits, its number, its step and the key. It does not depend on
    the place of the row or on the other requests in the batch.

    Returns: token ids [B] int32; the most likely ones if `temperature` is 0.
    """
    if self.temperature == 0.0:
      return first_largest(logits)
    logits = self.filtered(logits)

    def draw(
      row: Float[Array, " V"], number: Int[Array, ""], step: Int[Array, ""]
    ) -> Int[Array, ""]:
      return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, number), step), row)

    return jax.vmap(draw)(logits, numbers, steps).astype(jnp.int32)

  def filtered(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Divides logits [B, V] by the temperature, and sets those of excluded tokens to -inf.

    `top_k` and `top_p` exclude tokens.
    """
    logits = logits / self.temperature
    if 0 < self.top_k < logits.shape[-1]:
      least = jax.lax.top_k(logits, self.top_k)[0][:, -1:]
      logits = jnp.where(logits < least, -jnp.inf, logits)
    if self.top_p < 1.0:
      ordered = jnp.sort(logits, axis=-1)[:, ::-1]
      shares = jax.nn.softmax(ordered, axis=-1)
      before = jnp.cumsum(shares, axis=-1) - shares
      # Keeps the likeliest tokens until their sum reaches top_p, and the one that reaches it.
      least = jnp.min(jnp.where(before < self.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
      logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


GREEDY = Sampler()


def first_largest(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
  """Returns the index of the largest logit, the first of equal ones. [B, V] -> [B] int32.

  Two plain reductions are several times faster than XLA's argmax on a CPU.
  """
  top = jnp.max(logits, axis=-1, keepdims=True)
  index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  return jnp.min(jnp.where(logits == top, index, logits.shape[-1] - 1), axis=-1)


def margin(logits: Float[Array, "B V"], chosen: Int[Array, " B"]) -> Float[Array, " B"]:
  """Returns the logit of the chosen token minus that of the best other one. [B, V], [B] -> [B].

  It is negative if another token has a larger logit.
  """
  index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
  mine = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
  others = jnp.where(index == chosen[:, None], -jnp.inf, logits)
  return mine - jnp.max(others, axis=-1)
