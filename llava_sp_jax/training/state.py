"""Holds the train state: trainable and frozen parameters as two flat `{path: array}` trees."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.models import build
from llava_sp_jax.models.quantize import is_quantized
from llava_sp_jax.training import optimizer

Flat = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
  """Holds the step counter, the parameters and the optimizer state.

  `trainable` is float32. `frozen` has neither gradients nor moments.
  """

  step: jax.Array
  trainable: Flat
  frozen: Flat
  opt_state: Any  # of the optimizer's own kind


def check(config: config_lib.Config) -> None:
  """Raises ConfigError when the stage trains kernels that the model quantizes."""
  kernel, stage = "language_model/layers/q_proj/kernel", config.optimizer.stage
  trained = optimizer.group_of(kernel, stage) != optimizer.FROZEN
  if build.quantization(config.model) and trained:
    raise config_lib.ConfigError(
      f"model.quantize {config.model.quantize}: quantized kernels cannot be trained, but "
      f"optimizer.stage {stage} trains the decoder; use a stage that freezes it (finetune, with "
      "lora.rank > 0), or "
      "model.quantize none"
    )


def split(params: Any, config: config_lib.Config) -> tuple[Flat, Flat]:
  """Splits nested parameters into two flat `{path: array}` trees: (trainable, frozen).

  Trainable ones become float32, frozen ones `model.frozen_dtype`. Quantized kernels are not cast.
  """
  trainable, frozen = {}, {}
  for path, leaf in flatten_dict(params, sep="/").items():
    if optimizer.group_of(path, config.optimizer.stage) == optimizer.FROZEN:
      kept = is_quantized(path)
      frozen[path] = leaf if kept else leaf.astype(config.model.frozen_dtype)
    else:
      trainable[path] = leaf.astype(jnp.float32)
  return trainable, frozen


def join(trainable: Flat, frozen: Flat) -> dict[str, Any]:
  """Joins what `split` returns into the nested tree that `module.apply` takes."""
  result: dict[str, Any] = unflatten_dict({**trainable, **frozen}, sep="/")
  return result


def start(trainable: Flat, frozen: Flat, tx: optax.GradientTransformation) -> TrainState:
  """Returns the state before the first step, with the optimizer's initial moments."""
  return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, tx.init(trainable))
