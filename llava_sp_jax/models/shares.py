"""Divides attention over devices: each has its rows and heads.

Shape letters:  B rows . T queries . S keys . N heads . K key-value heads . H head width
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec
from jaxtyping import Float

from llava_sp_jax.models.arrays import Array


def sizes(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> tuple[int, int, int]:
  """Returns the rows, heads and key-value heads of a device; 0 for those that do not divide."""
  mesh = jax.sharding.get_abstract_mesh().shape
  rows, heads = (_ways(axis, mesh) for axis in ("batch", "heads"))
  counts = ((q.shape[0], rows), (q.shape[2], heads), (k.shape[2], heads))
  a, b, c = (0 if size % ways else size // ways for size, ways in counts)
  return a, b, c


def _ways(axis: str, mesh: dict[str, int]) -> int:
  """Returns the number of devices that a logical axis is divided over."""
  (names,) = nn.logical_to_mesh_axes((axis,)) or (None,)
  names = (names,) if isinstance(names, str) else names or ()
  return math.prod(mesh.get(name, 1) for name in names)


def on_each_device(local: Callable[..., jax.Array], heads_at: int) -> Callable[..., jax.Array]:
  """Returns a function of q, k, v and segments that runs `local` on each device's rows and heads.

  `heads_at` is the axis of heads in q, k and v.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return local
  names = tuple("heads" if axis == heads_at else None for axis in range(1, 4))
  heads = nn.logical_to_mesh_axes(("batch", *names)) or PartitionSpec()
  rows = nn.logical_to_mesh_axes(("batch", None)) or PartitionSpec()
  return jax.shard_map(
    local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
  )
