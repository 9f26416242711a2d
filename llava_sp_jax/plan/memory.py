"""Sums the HBM of one device by part, from the compiler's buffer assignment."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from llava_sp_jax.plan.hlo import Module

# (regex over the name of an argument, part); the first match wins.
PARTS: tuple[tuple[str, str], ...] = (
  (r"arguments\[0\]\.frozen", "frozen"),
  (r"arguments\[0\]\.trainable", "trainable"),
  (r"arguments\[0\]\.opt_state", "optimizer"),
  (r"arguments\[1\]", "batch"),
  (r"(values|arguments)\[0\]\[", "parameters"),  # of the engine's programs, like the next ones
  (r"values\[\d\]\.cache", "cache"),
  (r"values\[\d\]\.prefixes", "prefixes"),
  (r"", "other arguments"),
)
TEMPORARIES = "temporaries"


@dataclasses.dataclass(frozen=True)
class Memory:
  """Holds the bytes of a program in the HBM of one device, by part and in all."""

  parts: dict[str, int]  # part -> bytes
  total: int
  largest: tuple[tuple[int, str, str], ...] = ()  # (bytes, shape, traced name) of temporaries


def of_assignment(text: str, module: Module) -> Memory:
  """Reads the memory of a module from the text of its `buffer-assignment` dump.

  `module` gives the names of arguments and temporaries. The compiler writes that dump for a program
  that does not fit, too.
  """
  names = {number: op.op_name for number, op in module.entry.parameters.items()}
  origin = {op.name: op.op_name for c in module.computations.values() for op in c.ops}
  parts: dict[str, int] = {}
  values: dict[tuple[int, int], tuple[int, str, str]] = {}
  inside = False
  for line in text.splitlines():
    allocation = re.match(r"allocation \d+: size (\d+),(.*)", line)
    if allocation:
      size, rest = int(allocation.group(1)), allocation.group(2)
      if "color " in rest or "thread-local" in rest:
        inside = False
        continue  # not in HBM
      argument = re.search(r"parameter (\d+)", rest)
      inside = "preallocated-temp" in rest
      part = TEMPORARIES
      if argument:
        name = names.get(int(argument.group(1)), "")
        part = part_of(name)
      parts[part] = parts.get(part, 0) + size
    elif inside:
      value = re.match(r" value: <\d+ (\S+) @\d+> \(size=(\d+),offset=(\d+)\): (.*)", line)
      if value:
        name, size, offset = value.group(1), int(value.group(2)), int(value.group(3))
        shape = re.sub(r"\{.*", "", value.group(4))
        values.setdefault((offset, size), (size, shape, origin.get(name.split("{")[0], "")))
  largest = sorted(values.values(), reverse=True)[:10]
  return Memory(parts, sum(parts.values()), tuple(largest))


def of_analysis(sizes: dict[str, Any]) -> Memory:
  """Reads the memory of a program without a buffer assignment.

  `sizes` is the content of the done.json that `plan.lower` writes, in bytes.
  """
  parts: dict[str, int] = {}
  for name, size in sizes["arguments"].items():
    part = part_of(name)
    parts[part] = parts.get(part, 0) + size
  parts[TEMPORARIES] = sizes["temp_size_in_bytes"]
  parts["results"] = sizes["output_size_in_bytes"] - sizes["alias_size_in_bytes"]
  parts["program"] = sizes["generated_code_size_in_bytes"]
  return Memory(parts, sum(parts.values()))


def of_arguments(parts: dict[str, int]) -> Memory:
  """Returns the memory of a program that was not compiled, because its arguments do not fit.

  `parts` has their bytes on one device.
  """
  return Memory(dict(parts), sum(parts.values()))


def part_of(argument: str) -> str:
  """Returns the part in PARTS of a program's argument, such as "optimizer", by its name."""
  return next(part for pattern, part in PARTS if re.search(pattern, argument))
