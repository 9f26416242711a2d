"""FLOPs of Pallas kernels, which the compiler does not count: a table by the kernel's name.

Splash attention computes only the blocks of the causal triangle. Shapes: queries [.., N, T, H], keys
[.., K, S, H]. Shares of the peak were read from the kernel's own schedule on v5e.
"""

from __future__ import annotations

import math
import re

from llava_sp_jax.plan.hlo import Computation, Op

# (regex over the name of the traced operation, matmuls of [T, S] x H, share of the peak)
KERNELS: tuple[tuple[str, int, float], ...] = (
  (r"splash_m[hq]a_fwd", 2, 0.43),
  (r"splash_m[hq]a_dkv", 4, 0.67),
  (r"splash_m[hq]a_dq", 3, 0.67),
)
BLOCK = re.compile(r'block_q\\?": (\d+)')  # in the kernel's metadata


def is_kernel(op: Op) -> bool:
  return op.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in op.attributes


def flops(op: Op, computation: Computation) -> tuple[float, float]:
  """(FLOPs of a call, share of the peak); 0 FLOPs for a kernel that no row knows."""
  for pattern, matmuls, share in KERNELS:
    if re.search(pattern, op.name) or re.search(pattern, op.op_name):
      arrays = [computation.by_name[o].arrays[0] for o in op.operands if o in computation.by_name]
      heads = [a for a in arrays if len(a.dims) >= 3 and a.dtype in ("bf16", "f32", "f16")]
      if len(heads) < 2:
        return 0.0, share
      queries, keys = heads[0].dims, heads[1].dims
      return 2.0 * matmuls * math.prod(queries) * keys[-2] * _computed(op, keys[-2]), share
  return 0.0, 1.0


def _computed(op: Op, length: int) -> float:
  """Share of the square that a causal kernel computes: whole blocks, those on the diagonal too."""
  block = BLOCK.search(op.attributes)
  blocks = max(length // int(block.group(1)), 1) if block else 0
  return (blocks + 1) / (2 * blocks) if blocks else 0.5
