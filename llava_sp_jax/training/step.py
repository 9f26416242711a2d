"""Computes one training step: loss, gradients of the trainable parameters, and an AdamW update.

The loss is the mean over the supervised tokens of the global batch.

Shape letters:  B rows . A micro-batches . T row length . D width . V vocabulary
"""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models.llava import LlavaSP
from llava_sp_jax.training import guard, measure
from llava_sp_jax.training import loss as loss_lib
from llava_sp_jax.training.state import Flat, TrainState, join

ADAPTERS = r"/layers/.*/lora_[ab]$"  # regex of paths

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def loss_sums(
  module: LlavaSP, trainable: Flat, frozen: Flat, batch: Batch, chunk: int, rngs: Any = None
) -> measure.Sums:
  """Returns sums over a batch for `measure.report`: losses, correct tokens, counts.

  Args:
    module: the model.
    trainable: trainable parameters by path.
    frozen: all other parameters by path.
    batch: arrays of the data pipeline, on devices.
    chunk: positions whose logits are computed at once; the log-sum-exp is float32.
    rngs: random keys by name, such as "dropout"; None is no dropout.
  """
  apply: Any = functools.partial(module.apply, {"params": join(trainable, frozen)})
  hidden = apply(
    batch["tokens"],
    batch["positions"],
    batch["segments"],
    batch["images"],
    batch["slots"],
    rngs=rngs,
  )
  paths = module.language_model.head_paths()
  head_trainable = {p: trainable[p] for p in paths if p in trainable}
  head_frozen = {p: frozen[p] for p in paths if p in frozen}

  def head(params: Flat, h: jax.Array) -> jax.Array:
    result: jax.Array = module.apply({"params": join(params, {})}, h, method="logits")
    return result

  about_image = measure.about_image(batch)
  total = loss_lib.sums(
    head,
    chunk,
    head_trainable,
    head_frozen,
    hidden,
    batch["targets"],
    batch["weights"],
    about_image,
  )
  counts = measure.batch_sums(batch, about_image)
  return {**counts, "loss": total[0], "right": total[1], "image_loss": total[2]}


def loss_and_counts(
  module: LlavaSP, params: Any, batch: Batch, chunk: int, rngs: Any = None
) -> tuple[jax.Array, measure.Sums]:
  """Returns the mean loss over the supervised tokens, and the sums of `loss_sums`.

  `params` is the nested tree of all parameters. `chunk` is how many positions have their logits
  computed at once. Without `rngs` there is no dropout.
  """
  sums = loss_sums(module, flatten_dict(params, sep="/"), {}, batch, chunk, rngs)
  return sums["loss"] / jnp.maximum(sums["count"], 1), sums


def micro_batches(batch: Batch, count: int) -> Batch:
  """Splits a batch into A = `count` micro-batches. [B, ...] -> [A, B/A, ...]; A must divide B.

  Micro-batch a takes the rows a, a + A, a + 2A, ..., so no row moves to another device.
  """
  return {k: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0) for k, x in batch.items()}


def working_copies(trainable: Flat, dtype: Any) -> Flat:
  """Casts the trainable parameters of the decoder layers to `dtype`, as their modules would.

  Adapters are also gathered over the `fsdp` axis. Casting and gathering happen here once for all
  layers, passes and micro-batches, and the gather moves values of `dtype` instead of float32.
  """
  cast = {
    p: x.astype(dtype) if "/layers/" in p and p.startswith("language_model/") else x
    for p, x in trainable.items()
  }
  adapters = {p: x for p, x in cast.items() if re.search(ADAPTERS, p)}
  return {**cast, **sharding.gather(adapters)}


def gradients(
  module: LlavaSP, train: config_lib.TrainConfig, state: TrainState, batch: Batch, rng: jax.Array
) -> tuple[measure.Sums, Flat]:
  """Returns sums over a batch (`loss_sums`), and float32 gradients of the token-mean loss by path.

  With `train.accumulate` > 1, micro-batches are computed one after another. Each of their losses is
  divided by the token count of the whole batch, so the result is the same mean over the same
  tokens. Each micro-batch has its own dropout mask. Adapters' gradients are added up within each
  group of rows, and summed over the groups once, behind the last micro-batch.
  """
  rng = jax.random.fold_in(rng, state.step)
  count = jnp.maximum(batch["weights"].sum(), 1)

  def loss_fn(used: Flat, part: Batch, rng: jax.Array) -> tuple[jax.Array, measure.Sums]:
    rngs = {"dropout": rng}
    sums = loss_sums(module, used, state.frozen, part, train.loss_chunk, rngs)
    return sums["loss"] / count, sums

  working = working_copies(state.trainable, module.language_model.dtype)
  used = sharding.for_groups(working, ADAPTERS)

  def part_gradients(part: Batch, rng: jax.Array) -> tuple[measure.Sums, Flat]:
    grads, sums = jax.grad(loss_fn, has_aux=True)(used, part, rng)
    return sums, sharding.constrain(grads)  # summed over devices and sharded like the parameters

  def widened(grads: Flat) -> Flat:
    return {p: g.astype(state.trainable[p].dtype) for p, g in grads.items()}

  if train.accumulate == 1:
    sums, grads = part_gradients(batch, rng)
    return sums, widened(sharding.over_groups(grads, working))

  def body(carry: Any, xs: Any) -> Any:
    part, number = xs
    sums, grads = part_gradients(part, jax.random.fold_in(rng, number))
    sums, grads = jax.tree.map(jnp.add, carry, (sums, widened(grads)))
    return (sums, sharding.constrain(grads)), None

  parts = micro_batches(batch, train.accumulate), jnp.arange(train.accumulate)
  first = jax.tree.map(lambda x: x[0], parts[0])
  like, _ = jax.eval_shape(part_gradients, first, rng)
  zeros = {p: jnp.zeros(x.shape, state.trainable[p].dtype) for p, x in used.items()}
  start = (jax.tree.map(jnp.zeros_like, like), sharding.constrain(zeros))
  (sums, grads), _ = jax.lax.scan(body, start, parts)
  return sums, widened(sharding.over_groups(grads, working))


def train_step(
  module: LlavaSP,
  tx: optax.GradientTransformation,
  train: config_lib.TrainConfig,
  state: TrainState,
  batch: Batch,
  rng: jax.Array,
) -> tuple[TrainState, Metrics]:
  """Applies one update and returns the new state and the metrics of `measure.report`.

  Args:
    module: the model.
    tx: the optimizer.
    train: settings of the run.
    state: the state before the step.
    batch: arrays of the data pipeline, on devices.
    rng: random key of the run; folded with the step number, it seeds dropout.

  An update whose loss or gradient is not finite is dropped (`guard.keep_finite`).
  """
  sums, grads = gradients(module, train, state, batch, rng)
  updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
  new = state.replace(
    step=state.step + 1,
    trainable=optax.apply_updates(state.trainable, updates),
    opt_state=opt_state,
  )
  metrics = measure.report(sums, grads)
  new, metrics["nonfinite"] = guard.keep_finite(state, new, metrics["loss"], metrics["grad_norm"])
  return new, metrics
