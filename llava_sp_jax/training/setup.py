"""Builds what a run starts with: the abstract state, its shardings, and the compiled step.

The same shapes serve initialization, restoring, and planning for devices that are absent.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import initial
from llava_sp_jax.data import packing
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import build
from llava_sp_jax.training import (
  TRAIN_STEP,
  optimizer,
  state,
  step,
)

# A GPU's options let collectives run beside products. Gathering a layer early
# (xla_gpu_enable_pipelined_all_gather) costs 1.4 GiB for 7B on 8 GPUs and hides no more of them.
_GPU: dict[str, str | bool] = {"xla_gpu_enable_latency_hiding_scheduler": True}

# XLA options by platform. Without the first, the partitioner turns matmuls into chains of permutes,
# which the latency-hiding scheduler cannot fuse with collectives. Sums are combined up to a size, so
# that only small ones wait for each other: all gradients of a layer in one sum would begin with the
# last of them, when nothing is left to compute beside it. On v4 and v5p kernels are gathered as such,
# and not as sums of zeros, for which every product waits. The others let weight gathers and gradient
# sums run concurrently with matmuls on v6e, as they do by default on v5.
COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
  "tpu": {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_jf_crs_combiner_threshold_in_bytes": "1048576",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_enable_async_all_gather": "true",
    "xla_enable_async_all_reduce": "true",
  },
  "gpu": _GPU,
  "cuda": _GPU,  # as topologies call it
}
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # variables with the options that a user has chosen


def compiler_options(
  platform: str, environment: Mapping[str, str] = os.environ
) -> dict[str, str | bool] | None:
  """Returns the XLA options for a platform, without those that the user has set in FLAGS."""
  chosen = {
    flag.removeprefix("--").partition("=")[0]
    for name in FLAGS
    for flag in environment.get(name, "").split()
  }
  table = COMPILER_OPTIONS.get(platform, {})
  return {name: value for name, value in table.items() if name not in chosen} or None


def compile_step(module: Any, tx: Any, config: config_lib.Config, shardings: Any) -> Any:
  """Returns the jitted step `(state, batch, rng) -> (state, metrics)`, not yet compiled.

  `tx` is the optimizer. `shardings` has the sharding of each array of the state, whose buffers are
  donated.
  """

  places = jax.tree.leaves(shardings)
  platform = places[0].mesh.devices.flat[0].platform if places else jax.default_backend()
  module = build.compiled_for(
    module, platform, config.data.turns == "branch", packing.most_samples(config.data)
  )

  def program(*arguments: Any) -> Any:
    with nn.logical_axis_rules(sharding.activation_rules()):
      return step.train_step(module, tx, config.train, *arguments)

  program.__name__ = TRAIN_STEP  # its name in traces and compiler dumps
  return jax.jit(
    program,
    donate_argnums=0,
    out_shardings=(shardings, None),
    compiler_options=compiler_options(platform),
  )


class Abstract(NamedTuple):
  """Holds the shapes, shardings and optimizer of a train state without values."""

  shapes: Any  # state.TrainState of ShapeDtypeStructs
  shardings: Any  # the sharding of each leaf, in the same tree
  tx: optax.GradientTransformation


def abstract_state(config: config_lib.Config, device_mesh: Mesh, params: Any = None) -> Abstract:
  """Returns the shapes, the shardings and the optimizer of the state of step 0.

  `params` are nested arrays or shapes; None is the shapes of a new model.
  """
  params = build.abstract(config.model) if params is None else params
  trainable, frozen = jax.eval_shape(functools.partial(state.split, config=config), params)
  tx = optimizer.build(config.optimizer, config.train.steps, list(trainable))
  shapes = jax.eval_shape(functools.partial(state.start, tx=tx), trainable, frozen)
  return Abstract(shapes, sharding.shardings(shapes, device_mesh, config.mesh.base), tx)


def initial_state(config: config_lib.Config, device_mesh: Mesh) -> tuple[Any, Any, Any]:
  """Returns the state of step 0 placed on the mesh, its shardings, and its optimizer.

  Parameters come from where `config.init` says, or are random. Raises: ConfigError when the stage
  trains quantized kernels; FormatError when a checkpoint lacks parameters.
  """
  state.check(config)
  abstract = abstract_state(config, device_mesh)
  shapes, shardings, tx = abstract
  leaves = {**shapes.trainable, **shapes.frozen}
  places = {**shardings.trainable, **shardings.frozen}
  params = initial.initial_params(
    config, lambda _: places, {path: leaf.dtype for path, leaf in leaves.items()}
  )
  trainable, frozen = state.split(params, config)  # they have their dtypes: nothing is copied

  def rest(trainable: state.Flat) -> tuple[Any, Any]:
    return jnp.zeros((), jnp.int32), tx.init(trainable)

  start = jax.jit(rest, out_shardings=(shardings.step, shardings.opt_state))
  step, moments = start(trainable)
  return state.TrainState(step, trainable, frozen, moments), shardings, tx


def summary(config: config_lib.Config, train_state: Any, device_mesh: Mesh) -> str:
  """Returns the line that a run prints first: stage, variant, counts of parameters, and mesh."""
  trainable = sum(x.size for x in train_state.trainable.values())
  frozen = sum(x.size for x in train_state.frozen.values())
  axes = " x ".join(f"{name} {size}" for name, size in device_mesh.shape.items())
  parts = ", ".join(f"{p} {n:,}" for p, n in build.parameter_counts(config.model).items())
  return (
    f"{config.name}: stage {config.optimizer.stage}, variant {config.model.projector.variant}, "
    f"{trainable:,} trainable parameters, {frozen:,} frozen ({parts}); mesh {axes}"
  )
