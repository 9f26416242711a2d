"""Reads which partitions a collective joins."""

from __future__ import annotations

import re


def first(attributes: str, devices: int) -> list[int]:
  """Returns the partitions of a collective's first group, from any of the notations of HLO.

  `devices` is the number of all partitions, which are one group if `attributes` names none.
  """
  listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
  if listed:
    return [int(i) for i in listed.group(1).split(",") if i]
  pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes)
  if pairs:
    return [int(pairs.group(1)), int(pairs.group(2))]
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
  if iota:
    shape, dims = (_numbers(iota.group(i)) for i in (1, 2))
    order = _numbers(iota.group(3)) if iota.group(3) else list(range(len(dims)))
    return _transposed(dims, order)[: shape[-1]]
  named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
  if named:
    axes = re.findall(r"'(\w+)'=(\d+)", named.group(1))
    names, sizes = [a for a, _ in axes], [int(s) for _, s in axes]
    used = re.findall(r"'(\w+)'", named.group(2))
    last = [names.index(a) for a in names if a in used]
    order = [i for i in range(len(names)) if i not in last] + last
    count = 1
    for i in last:
      count *= sizes[i]
    return _transposed(sizes, order)[:count]
  return list(range(devices))


def _numbers(text: str) -> list[int]:
  return [int(v) for v in text.split(",")]


def _transposed(dims: list[int], order: list[int]) -> list[int]:
  """Returns arange(prod(dims)), reshaped to `dims`, transposed by `order`, and flattened."""
  strides = [1] * len(dims)
  for i in reversed(range(len(dims) - 1)):
    strides[i] = strides[i + 1] * dims[i + 1]
  flat = [0]
  for axis in order:
    flat = [base + i * strides[axis] for base in flat for i in range(dims[axis])]
  return flat
