"""Counts the FLOPs of Pallas kernels, which the compiler does not, by a table of their names.

Attention computes only the tiles that the causal triangle touches, and flash attention only those
of them that have a query and a key of the same sample. Shapes: queries [.., N, T, H], keys [.., K,
S, H], or with heads side by side, [.., T, N H]. The shares of the peak are those of splash's
schedule on v5e, on every chip: published runs were compared with them, so the band of a chip holds
what its kernels lose. By the instructions of their schedules, the kernels of flash have .57 and .85 on
v5e, rotations included, and .17 and .30 on v6e, whose products are four times as fast beside the same
vector unit; so on v6e a step without its band is too short. Rotations of queries and keys, which a
kernel does before its products, are added.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

from llava_sp_jax.plan.hlo import Computation, HloArray, Op


@dataclasses.dataclass(frozen=True)
class Row:
  """Holds what is assumed of rows: `samples` equal ones on the share `filled` of the places.

  One sample is assumed to fill the row. A step waits for the device with most to compute, so on
  many devices this is the row that counts, whatever the others hold.
  """

  samples: int = 1
  filled: float = 1.0

  def first_keys(self, length: int) -> list[int]:
    """Returns the first key that each of `length` queries sees; padding sees itself."""
    if self.samples == 1:
      return [0] * length
    size = length * self.filled / self.samples
    begins = [round(size * number) for number in range(self.samples + 1)]
    inside = [begin for begin, end in itertools.pairwise(begins) for _ in range(begin, end)]
    return [*inside, *range(begins[-1], length)]


FULL = Row()

# (regex over the name of the traced operation, matmuls of [T, S] x H, share of the peak)
KERNELS: tuple[tuple[str, int, float], ...] = (
  (r"flash_forward", 2, 0.43),
  (r"flash_backward", 5, 0.67),
  (r"splash_m[hq]a_fwd", 2, 0.43),
  (r"splash_m[hq]a_dkv", 5, 0.67),  # all three gradients in one kernel, as in `models.attention`
)
SKIPS = r"flash_"  # regex of those that skip other samples; the others mask them
# (regex over the name, how often a kernel rotates queries and keys if it does: gradients, too)
ROTATIONS = (("flash_forward", 1), ("flash_backward", 2))
ROTATES = re.compile(r'"?rotates\\?": 1')  # in a kernel's metadata
# Vector operations for a rotated element, from the schedules on v5e, where halves are swapped beside.
ROTATION = 9.0
# Patterns of the sides of a tile in a kernel's metadata; the first match is for its own pass.
TILE = tuple(re.compile(rf'block_{side}(?:_dkv)?\\?": (\d+)') for side in ("q", "kv"))


def is_kernel(op: Op) -> bool:
  """Returns whether an operation is a Pallas kernel on TPU."""
  return op.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in op.attributes


def flops(op: Op, computation: Computation, row: Row = FULL) -> tuple[float, float]:
  """Returns the FLOPs of a call, and the share of the chip's peak that the kernel reaches.

  `row` is what rows hold. The FLOPs are 0 for a kernel without a row in KERNELS.
  """
  for pattern, matmuls, share in KERNELS:
    if re.search(pattern, op.name) or re.search(pattern, op.op_name):
      heads = _heads(op, computation)
      if len(heads) < 2:
        return 0.0, share
      queries, keys = heads[0].dims, heads[1].dims
      skips = re.search(SKIPS, pattern) is not None
      computed = _computed(op, queries[-2], keys[-2], row if skips else FULL)
      return 2.0 * matmuls * math.prod(queries) * keys[-2] * computed, share
  return 0.0, 1.0


def vector(op: Op, computation: Computation) -> float:
  """Returns the vector operations of a call that are not in the share of the peak: rotations."""
  if not ROTATES.search(op.attributes):
    return 0.0
  times = next((n for pattern, n in ROTATIONS if pattern in op.name or pattern in op.op_name), 0)
  return ROTATION * times * sum(array.size for array in _heads(op, computation)[:2])


def _heads(op: Op, computation: Computation) -> list[HloArray]:
  """Returns the arrays of heads that a call reads, queries and keys first."""
  arrays = [computation.by_name[o].arrays[0] for o in op.operands if o in computation.by_name]
  return [a for a in arrays if len(a.dims) >= 3 and a.dtype in ("bf16", "f32", "f16")]


def _computed(op: Op, queries: int, keys: int, row: Row) -> float:
  """Returns the share of the attention matrix that a causal kernel computes, in whole tiles."""
  sides = [side.search(op.attributes) for side in TILE]
  if not all(sides):
    return 0.5
  rows, columns = (int(side[1]) for side in sides if side)
  first = row.first_keys(queries)
  touched = sum(
    math.ceil((start + rows) / columns) - first[start] // columns
    for start in range(0, queries, rows)
  )
  return touched / ((queries // rows) * (keys // columns))
