"""Device meshes, multi-host start-up, and putting host batches on devices."""

from __future__ import annotations

import math
import os
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llava_sp_jax import config as config_lib

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))


def start_processes() -> None:
  """Joins the other hosts where the environment says that there are any (Cloud TPU pods, SLURM)."""
  many = int(os.environ.get("SLURM_NTASKS", "1")) > 1
  many |= len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
  if many and not jax.distributed.is_initialized():
    jax.distributed.initialize()


def create(config: config_lib.Mesh, batch_size: int | None = None) -> Mesh:
  """A mesh over all devices with axes data, fsdp, tensor (Auto axes).

  Raises:
    ConfigError: when the sizes do not divide the devices, or `batch_size` the batch axes.
  """
  sizes = [getattr(config, name) for name in AXES]
  count = jax.device_count()
  known = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) == 1 and known and count % known == 0:
    sizes[sizes.index(-1)] = count // known
  if math.prod(sizes) != count or min(sizes) < 1:
    asked = ", ".join(f"{n}={getattr(config, n)}" for n in AXES)
    raise config_lib.ConfigError(f"mesh: {asked} does not make {count} devices")
  rows = sizes[0] * sizes[1]
  if batch_size is not None and batch_size % rows:
    raise config_lib.ConfigError(
      f"train.batch_size: {batch_size} rows cannot be divided over data*fsdp = {rows} devices"
    )
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """This process's rows of a batch -> global arrays sharded over their rows."""
  sharding = NamedSharding(mesh, BATCH)
  return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
