"""Makes device meshes, also over several slices, and puts host batches on devices."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llava_sp_jax import config as config_lib

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))


def create(
  config: config_lib.MeshConfig,
  batch_size: int | None = None,
  accumulate: int = 1,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """Returns a mesh with axes data, fsdp, tensor (Auto axes) over `devices`; None is all.

  Args:
    config: sizes of the axes.
    batch_size: rows of a global batch, which the mesh must divide; None is not checked.
    accumulate: micro-batches that each batch is divided into.
    devices: those of the mesh.

  Raises: ConfigError when the sizes do not multiply to the number of devices, or do not fit its
    slices, or `batch_size` is not a multiple of data * fsdp * accumulate.
  """
  devices = jax.devices() if devices is None else devices
  sizes = axis_sizes(config, len(devices))
  if batch_size is not None:
    check_batch(sizes, batch_size, accumulate)
  slices = slice_count(config, devices)
  if slices == 1:
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=types, devices=devices)
  return Mesh(hybrid(sizes, slices, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local(text: str) -> Mesh | None:
  """Parses "DATA,FSDP,TENSOR" as a mesh over the devices of this process; returns None for "".

  A size of -1 takes the remaining devices. Sizes that need fewer devices take the first ones.

  Raises: ConfigError for another form, or sizes that the devices do not make.
  """
  if not text:
    return None
  parts = text.split(",")
  if len(parts) != len(AXES) or not all(re.fullmatch(r"-1|[1-9]\d*", part) for part in parts):
    raise config_lib.ConfigError(
      f"--mesh: expected sizes of {', '.join(AXES)} such as 1,1,4 (-1: what is left), "
      f"found {text!r}"
    )
  data, fsdp, tensor = map(int, parts)
  devices = jax.local_devices()
  if -1 not in (data, fsdp, tensor):
    devices = devices[: data * fsdp * tensor]
  return create(config_lib.MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices=devices)


def axis_sizes(config: config_lib.MeshConfig, count: int) -> list[int]:
  """Returns the number of devices along data, fsdp and tensor, for `count` devices in all.

  A size of -1 takes the remaining devices.

  Raises: ConfigError when the sizes do not multiply to `count`.
  """
  sizes = [getattr(config, name) for name in AXES]
  known = math.prod(s for s in sizes if s != -1)
  if sizes.count(-1) == 1 and known and count % known == 0:
    sizes[sizes.index(-1)] = count // known
  if math.prod(sizes) != count or min(sizes) < 1:
    asked = ", ".join(f"{n}={getattr(config, n)}" for n in AXES)
    raise config_lib.ConfigError(
      f"mesh: {asked} does not make {count} devices ({jax.process_count()} processes)"
    )
  return sizes


def check_batch(sizes: Sequence[int], batch_size: int, accumulate: int = 1) -> None:
  """Checks that `batch_size` is a multiple of data * fsdp * accumulate; `sizes` are those of AXES.

  Raises: ConfigError if it is not.
  """
  parts = sizes[0] * sizes[1]
  least = parts * accumulate
  if batch_size < 1 or least < 1 or batch_size % least:
    micro = "" if accumulate == 1 else f" in train.accumulate = {accumulate} micro-batches"
    can = f"; give a multiple of {least}" if least > 0 else ""
    raise config_lib.ConfigError(
      f"train.batch_size: {batch_size} rows cannot be divided over data*fsdp = "
      f"{sizes[0]}*{sizes[1]} = {parts} devices of {jax.process_count()} processes{micro}{can}"
    )


def slice_count(config: config_lib.MeshConfig, devices: Sequence[Any]) -> int:
  """Returns the number of slices: groups of devices that the slow network joins.

  TPUs report their slice; elsewhere, `mesh.slices` is the number of groups.

  Raises: ConfigError when `mesh.slices` contradicts what the devices report.
  """
  found = len({getattr(device, "slice_index", 0) for device in devices})
  asked = config.slices or found
  if found > 1 and asked != found:
    raise config_lib.ConfigError(
      f"mesh.slices: {asked}, but the {len(devices)} devices are in {found} slices; "
      f"give {found}, or 0 for what is found"
    )
  return asked


def hybrid(sizes: Sequence[int], slices: int, devices: Sequence[Any]) -> np.ndarray:
  """Returns devices as [data, fsdp, tensor], where only the `data` axis crosses slices.

  The data axis is slice-major. So fsdp and tensor communicate within a slice, and only gradients
  cross the data-center network.

  Raises: ConfigError when `data` is not a multiple of the slices, or the processes cannot be
  grouped into slices.
  """
  data, *inner = sizes
  if data % slices:
    raise config_lib.ConfigError(
      f"mesh.data: {data} cannot be divided over {slices} slices; slices are joined along data, so "
      f"give a multiple of {slices}"
    )
  shape = (data // slices, *inner)
  if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
    return mesh_utils.create_hybrid_device_mesh(shape, (slices, 1, 1), devices)
  count = len({device.process_index for device in devices})
  if count % slices or len(devices) % slices:
    raise config_lib.ConfigError(
      f"mesh.slices: {count} processes with {len(devices)} devices cannot be grouped into {slices} "
      "slices; start a multiple of that many processes"
    )
  ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
  groups = np.array_split(np.array(ordered, dtype=object), slices)
  return np.concatenate([mesh_utils.create_device_mesh(shape, list(group)) for group in groups])


def rows(mesh: Mesh, batch_size: int, process: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Returns the rows of each batch that a process makes, and which of them it owns.

  The rows are int [b], ascending, and the owned ones bool [b]. A process makes the rows that its
  devices hold; on a TPU torus they need not be neighbors. Processes that the tensor axis joins make
  the same rows, and the first of these processes owns them: it alone records them. `process` None
  is this process.
  """
  process = jax.process_index() if process is None else process
  parts = mesh.devices.reshape(_parts(mesh), -1)
  each = np.arange(batch_size).reshape(len(parts), -1)
  makers = [{device.process_index for device in devices} for devices in parts]
  mine = [i for i, who in enumerate(makers) if process in who]
  owned = [min(makers[i]) == process for i in mine]
  return each[mine].reshape(-1), np.repeat(owned, each.shape[1])


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, Any]:
  """Puts the rows that this process made on its devices, and returns arrays of the global batch.

  `batch` has arrays [b, ...] with the rows that `rows` names.
  """
  sharding = NamedSharding(mesh, BATCH)
  if jax.process_count() == 1:
    result: dict[str, Any] = jax.device_put(batch, sharding)
    return result
  local = len(next(iter(batch.values())))
  held = len(rows(mesh, _parts(mesh))[0])
  total = local // held * _parts(mesh)
  mine = rows(mesh, total)[0]

  def place(array: np.ndarray) -> jax.Array:
    def part(index: Any) -> np.ndarray:
      first = int(np.searchsorted(mine, index[0].start or 0))
      return array[first : first + total // _parts(mesh)]

    return jax.make_array_from_callback((total, *array.shape[1:]), sharding, part)

  return {name: place(array) for name, array in batch.items()}


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
  """Places an array, which every process has in full, on the devices of all as `sharding` says."""
  if sharding.is_fully_addressable:
    result: jax.Array = jax.device_put(array, sharding)
    return result
  return jax.make_array_from_callback(np.shape(array), sharding, lambda index: array[index])


def spans_processes(mesh: Mesh) -> bool:
  """Returns whether several processes hold devices of the mesh."""
  return len({device.process_index for device in mesh.devices.flat}) > 1


def _parts(mesh: Mesh) -> int:
  """Returns the number of parts that a batch is divided into."""
  return math.prod(mesh.shape[name] for name in BATCH[0])
