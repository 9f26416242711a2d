"""One training step: token-mean loss over the global batch, gradients of what learns, AdamW.

Shape letters:  B rows . T row length . D width . V vocabulary
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llava_sp_jax.models.llava import LlavaSP
from llava_sp_jax.train.state import Flat, TrainState, join

Metrics = dict[str, jax.Array]


def loss_and_counts(
  module: LlavaSP, params: Any, batch: dict[str, jax.Array], chunk: int, rngs: Any = None
) -> tuple[jax.Array, Metrics]:
  """Sum of the loss over learned tokens / their number, and that number with the correct ones.

  The head runs over slices of `chunk` positions, each recomputed in the backward pass, so that
  logits for the whole row never exist. Log-sum-exp is float32.
  """
  apply: Any = functools.partial(module.apply, {"params": params})  # linen's own type is a union
  hidden = apply(
    batch["tokens"], batch["positions"], batch["segments"], batch["images"], batch["slots"],
    rngs=rngs,
  )  # fmt: skip

  def slice_sums(h: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    logits = apply(h, method="logits")
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights
    right = (jnp.argmax(logits, axis=-1) == targets) * weights
    return jnp.stack([loss.sum(), right.sum()])

  length = hidden.shape[1]
  pieces = [slice(i, min(i + chunk, length)) for i in range(0, length, chunk)]
  sums = jax.checkpoint(slice_sums) if len(pieces) > 1 else slice_sums
  total = sum(
    (sums(hidden[:, s], batch["targets"][:, s], batch["weights"][:, s]) for s in pieces),
    start=jnp.zeros(2),
  )
  count = batch["weights"].sum()
  return total[0] / jnp.maximum(count, 1), {"right": total[1], "count": count}


def train_step(
  module: LlavaSP, tx: optax.GradientTransformation, chunk: int, state: TrainState,
  batch: dict[str, jax.Array], rng: jax.Array,
) -> tuple[TrainState, Metrics]:  # fmt: skip
  """state, batch -> state, metrics (float32 scalars). `rng` seeds dropout, folded with the step."""
  rngs = {"dropout": jax.random.fold_in(rng, state.step)}

  def loss_fn(trainable: Flat) -> tuple[jax.Array, Metrics]:
    return loss_and_counts(module, join(trainable, state.frozen), batch, chunk, rngs)

  (loss, counts), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.trainable)
  updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
  new = state.replace(
    step=state.step + 1,
    trainable=optax.apply_updates(state.trainable, updates),
    opt_state=opt_state,
  )
  accuracy = counts["right"] / jnp.maximum(counts["count"], 1)
  metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads), "token_accuracy": accuracy,
             "tokens": counts["count"]}  # fmt: skip
  return new, metrics
