"""Divides attention, and what it keeps, over devices: each has its rows and heads.

Shape letters:  B rows . T queries . S keys . N heads . K key-value heads . H head width
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec
from jaxtyping import Float, Int

from llava_sp_jax.models.arrays import Array


def sizes(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> tuple[int, int, int]:
  """Returns the rows, heads and key-value heads of a device; 0 for those that do not divide."""
  mesh = jax.sharding.get_abstract_mesh().shape
  rows, heads = (_ways(axis, mesh) for axis in ("batch", "heads"))
  counts = ((q.shape[0], rows), (q.shape[2], heads), (k.shape[2], heads))
  a, b, c = (0 if size % ways else size // ways for size, ways in counts)
  return a, b, c


def device_kind() -> str:
  """Returns jax's name of the devices that a program is traced for, such as "TPU v4"."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return str((device or jax.local_devices()[0]).device_kind)


def _names(axis: str) -> tuple[str, ...]:
  """Returns the axes of the mesh that divide a logical axis."""
  (names,) = nn.logical_to_mesh_axes((axis,)) or (None,)
  return (names,) if isinstance(names, str) else tuple(names or ())


def _ways(axis: str, mesh: Mapping[str, int]) -> int:
  """Returns the number of devices that a logical axis is divided over."""
  return math.prod(mesh.get(name, 1) for name in _names(axis))


def specs(heads: int) -> tuple[PartitionSpec, PartitionSpec]:
  """Returns how arrays [B, ...] are divided, and arrays [B, `heads`, ...]; rows must divide."""
  ways = _ways("heads", jax.sharding.get_abstract_mesh().shape)
  divided = None if heads % ways else _names("heads")
  return PartitionSpec(_names("batch")), PartitionSpec(_names("batch"), divided)


def part_of_rows() -> Int[Array, ""]:
  """Returns which part of the rows a device has, from 0; called inside `shard_map`."""
  return jax.lax.axis_index(_names("batch"))


def on_each_device(local: Callable[..., jax.Array], heads_at: int) -> Callable[..., jax.Array]:
  """Returns a function of q, k, v and arrays of rows that runs `local` on a device's rows and heads.

  `heads_at` is the axis of heads in q, k and v. The other arrays, such as segments, begin [B, T].
  """
  if jax.sharding.get_abstract_mesh().empty:
    return local
  names = tuple("heads" if axis == heads_at else None for axis in range(1, 4))
  heads = nn.logical_to_mesh_axes(("batch", *names)) or PartitionSpec()
  rows = nn.logical_to_mesh_axes(("batch", None)) or PartitionSpec()

  def run(*arrays: jax.Array) -> jax.Array:
    specs = (heads, heads, heads, *[rows] * (len(arrays) - 3))
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(*arrays)

  return run
