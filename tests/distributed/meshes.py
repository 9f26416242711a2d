"""Meshes of the eight devices, and steps of training on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import anyres, pipeline
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.models import build
from llava_sp_jax.training import setup

STEPS = 5
MESHES = {"one": (1, 1, 1), "fsdp": (1, 8, 1), "three": (2, 2, 2)}  # data, fsdp, tensor


def mesh_of(sizes: tuple[int, ...]) -> Mesh:
  if np.prod(sizes) == jax.device_count():
    return mesh_lib.create(config_lib.MeshConfig(**dict(zip(mesh_lib.AXES, sizes, strict=True))))
  axis_types = (AxisType.Auto,) * len(sizes)
  devices = jax.devices()[: int(np.prod(sizes))]
  return jax.make_mesh(sizes, mesh_lib.AXES, axis_types=axis_types, devices=devices)


def batches(config: config_lib.Config) -> Iterator[dict[str, np.ndarray]]:
  made = pipeline.make(
    config.data,
    Tokenizer(config.data.tokenizer),
    anyres.Tile(*build.tile_shape(config.model)),
    config.train.batch_size,
    config.train.seed,
  )
  return ({k: v for k, v in batch.items() if k != pipeline.SAMPLES} for batch in made)


def run(config: config_lib.Config, mesh: Mesh) -> tuple[list[float], Any]:
  """Losses of STEPS steps through the package's own step, and the state after them."""
  with jax.set_mesh(mesh):
    state, shardings, tx = setup.initial_state(config, mesh)
    step = setup.compile_step(build.model(config.model), tx, config, shardings)
    rng, losses = jax.random.key(0), []
    rows = batches(config)
    for _ in range(STEPS):
      state, metrics = step(state, mesh_lib.put_batch(next(rows), mesh), rng)
      losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1, "a step compiles once"
  return losses, state


def parts(leaf: jax.Array) -> list[tuple[str, ...]]:
  """The mesh axes of each dimension."""
  assert isinstance(leaf.sharding, NamedSharding)
  spec = [*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))]
  return [(s,) if isinstance(s, str) else tuple(s or ()) for s in spec]
