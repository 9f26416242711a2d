"""From logits to the next token."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pick(logits: jax.Array, rng: jax.Array, temperature: float) -> jax.Array:
  """Greedy at temperature 0, otherwise a sample. [B, V] -> [B] int32."""
  if temperature == 0.0:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return jax.random.categorical(rng, logits / temperature, axis=-1).astype(jnp.int32)
