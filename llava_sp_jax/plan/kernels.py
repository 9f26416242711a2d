"""Counts the FLOPs of Pallas kernels, which the compiler does not, by a table of their names.

Splash attention computes only the tiles that the causal triangle touches. Shapes: queries [.., N,
T, H], keys [.., K, S, H]. The shares of the peak are from the kernels' own schedules on v5e.
"""

from __future__ import annotations

import math
import re

from llava_sp_jax.plan.hlo import Computation, Op

# (regex over the name of the traced operation, matmuls of [T, S] x H, share of the peak)
KERNELS: tuple[tuple[str, int, float], ...] = (
  (r"splash_m[hq]a_fwd", 2, 0.43),
  (r"splash_m[hq]a_dkv", 5, 0.67),  # all three gradients in one kernel, as in `models.attention`
)
# Patterns of the sides of a tile in a kernel's metadata; the first match is for its own pass.
TILE = tuple(re.compile(rf'block_{side}(?:_dkv)?\\?": (\d+)') for side in ("q", "kv"))


def is_kernel(op: Op) -> bool:
  """Returns whether an operation is a Pallas kernel on TPU."""
  return op.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in op.attributes


def flops(op: Op, computation: Computation) -> tuple[float, float]:
  """Returns the FLOPs of a call, and the share of the chip's peak that the kernel reaches.

  The FLOPs are 0 for a kernel without a row in KERNELS.
  """
  for pattern, matmuls, share in KERNELS:
    if re.search(pattern, op.name) or re.search(pattern, op.op_name):
      arrays = [computation.by_name[o].arrays[0] for o in op.operands if o in computation.by_name]
      heads = [a for a in arrays if len(a.dims) >= 3 and a.dtype in ("bf16", "f32", "f16")]
      if len(heads) < 2:
        return 0.0, share
      queries, keys = heads[0].dims, heads[1].dims
      computed = _computed(op, queries[-2], keys[-2])
      return 2.0 * matmuls * math.prod(queries) * keys[-2] * computed, share
  return 0.0, 1.0


def _computed(op: Op, queries: int, keys: int) -> float:
  """Returns the share of the attention matrix that a causal kernel computes, in whole tiles."""
  sides = [side.search(op.attributes) for side in TILE]
  if not all(sides):
    return 0.5
  rows, columns = (int(side[1]) for side in sides if side)
  starts = [range(0, n, step) for n, step in ((queries, rows), (keys, columns))]
  touched = sum(column < row + rows for row in starts[0] for column in starts[1])
  return touched / (len(starts[0]) * len(starts[1]))
