"""Reads a scheduled HLO module from its text: computations, operations, shapes, trip counts.

Only what a cost model needs is understood. The metadata of kernels holds newlines and braces, so
operations are put together before they are parsed, and parentheses in strings do not count.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from llava_sp_jax.errors import LlavaSPError

WIDTHS = {"pred": 1, "token": 0, "opaque": 0}  # bytes; all others say their bits in their name
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
# What begins a statement; lines that do not continue one (kernels have metadata of several lines).
_BEGINS = re.compile(r"  (ROOT )?%|\}$|$|%|ENTRY ")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", re.DOTALL)
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")


class HloError(LlavaSPError, ValueError):
  """Text that is no HLO module, or one without what was asked for."""


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a shape; `space` 0 is HBM, 1 is VMEM, others are scalar memories."""

  dtype: str
  dims: tuple[int, ...]
  space: int = 0

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def bytes(self) -> int:
    return math.ceil(self.size * width(self.dtype))


def width(dtype: str) -> float:
  """Bytes of one element."""
  if dtype in WIDTHS:
    return WIDTHS[dtype]
  bits = re.search(r"\d+", dtype)
  return int(bits.group()) / 8 if bits else 4


@dataclasses.dataclass(frozen=True)
class Op:
  name: str
  opcode: str
  arrays: tuple[Array, ...]  # of the result; a tuple has several
  operands: tuple[str, ...]
  attributes: str
  root: bool
  argument: str  # text between the parentheses: a parameter's number, a constant's value

  @functools.cached_property
  def called(self) -> dict[str, str]:
    """{"calls" | "to_apply" | "body" | "condition": computation}."""
    return {m.group(0).split("=")[0]: m.group(1) for m in _CALLED.finditer(self.attributes)}

  @functools.cached_property
  def op_name(self) -> str:
    """Where the operation comes from in the traced program; empty when it does not say."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return found.group(1) if found else ""

  def attribute(self, pattern: str) -> str:
    """The first group of `pattern` in the attributes, or an empty string."""
    found = re.search(pattern, self.attributes)
    return found.group(1) if found else ""

  @property
  def bytes(self) -> int:
    return sum(a.bytes for a in self.arrays)


@dataclasses.dataclass(frozen=True)
class Computation:
  name: str
  ops: tuple[Op, ...]  # in the order of the schedule

  @functools.cached_property
  def by_name(self) -> dict[str, Op]:
    return {op.name: op for op in self.ops}

  @functools.cached_property
  def users(self) -> dict[str, list[Op]]:
    result: dict[str, list[Op]] = {}
    for op in self.ops:
      for operand in dict.fromkeys(op.operands):
        result.setdefault(operand, []).append(op)
    return result

  @functools.cached_property
  def parameters(self) -> dict[int, Op]:
    return {int(op.argument): op for op in self.ops if op.opcode == "parameter"}

  @property
  def root(self) -> Op:
    return next(op for op in self.ops if op.root)


@dataclasses.dataclass(frozen=True)
class Module:
  computations: dict[str, Computation]
  entry: Computation

  def trip_count(self, loop: Op) -> int | None:
    """How often a `while` runs, or None when it depends on values."""
    known = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if known:
      return int(known)
    condition = self.computations[loop.called["condition"]]
    compare = condition.root
    if compare.opcode == "fusion":
      condition = self.computations[compare.called["calls"]]
      compare = condition.root
    if compare.opcode != "compare" or compare.attribute(r"direction=(\w+)") != "LT":
      return None
    bound = condition.by_name.get(compare.operands[1])
    return int(bound.argument) if bound and bound.opcode == "constant" else None


def parse(text: str) -> Module:
  """A module from its text. Raises: HloError."""
  computations: dict[str, Computation] = {}
  entry, name, ops = None, "", list[Op]()
  for line in _statements(text):
    header = _HEADER.match(line)
    if header and not line.startswith(" "):
      name, ops = header.group(2), []
      entry = name if header.group(1) else entry
    elif line == "}" and name:
      computations[name] = Computation(name, tuple(ops))
      name = ""
    elif name and line.startswith("  "):
      ops.append(_op(line))
  if entry is None or entry not in computations:
    raise HloError("expected the text of an HLO module with an ENTRY computation")
  return Module(computations, computations[entry])


def _statements(text: str) -> Iterator[str]:
  """Headers, operations and closing braces, each as one text, however many lines it takes."""
  held: list[str] = []
  for line in text.splitlines():
    if held and _BEGINS.match(line):
      yield "\n".join(held)
      held = []
    held.append(line)
  yield "\n".join(held)


def _op(line: str) -> Op:
  left, _, right = line.strip().partition(" = ")
  root = left.startswith("ROOT ")
  end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
  arrays = tuple(_arrays(right[:end]))
  opcode = _OPCODE.match(right, end)
  if opcode is None:
    raise HloError(f"cannot read the operation {line.strip()[:200]!r}")
  start = opcode.end() - 1
  stop = _closing(right, start)
  argument = right[start + 1 : stop]
  operands = () if opcode.group(1) == "constant" else tuple(re.findall(r"%([\w.\-]+)", argument))
  name = left.removeprefix("ROOT ").lstrip("%")
  return Op(name, opcode.group(1), arrays, operands, right[stop + 1 :], root, argument)


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`; strings are jumped over."""
  depth, quoted = 0, False
  for i in range(start, len(text)):
    c = text[i]
    if c == '"' and text[i - 1] != "\\":
      quoted = not quoted
    elif not quoted:
      depth += (c == "(") - (c == ")")
      if depth == 0:
        return i
  raise HloError(f"no closing parenthesis in {text[start : start + 200]!r}")


def _arrays(text: str) -> Iterator[Array]:
  for dtype, dims, layout in _ARRAY.findall(text):
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
    yield Array(dtype, sizes, int(space.group(1)) if space else 0)
