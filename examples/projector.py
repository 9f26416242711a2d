"""Trains a Flax model around `llava.Projector` to tell four random grids of features apart."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import llava_sp_jax as llava


class Classifier(nn.Module):
  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:  # [B, G, G, C] -> [B, classes]
    tokens = llava.Projector("pooling", 16, 32)(features)  # [B, 6 + G*G, 32], spatial ones first
    return nn.Dense(4)(tokens[:, :6].reshape(len(features), -1))


def main(steps: int = 20) -> list[float]:
  model, tx = Classifier(), optax.adamw(1e-2)
  features, labels = jax.random.normal(jax.random.key(0), (4, 6, 6, 8)), jnp.arange(4)
  params = model.init(jax.random.key(1), features)

  def loss(params: optax.Params) -> jax.Array:
    logits = model.apply(params, features)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

  @jax.jit
  def step(state: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], jax.Array]:
    value, gradients = jax.value_and_grad(loss)(state[0])
    updates, moments = tx.update(gradients, state[1], state[0])
    return (optax.apply_updates(state[0], updates), moments), value

  _, losses = jax.lax.scan(step, (params, tx.init(params)), length=steps)
  return [float(value) for value in losses]


if __name__ == "__main__":
  print(main())
