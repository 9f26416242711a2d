"""Parses the text of a scheduled HLO module: computations, operations, shapes, trip counts.

Parses only what the cost model needs. The metadata of Pallas kernels contains newlines and braces,
so the lines of an operation are joined before it is parsed, and parentheses within strings are
ignored.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from llava_sp_jax.errors import LlavaSPError

WIDTHS = {"pred": 1, "token": 0, "opaque": 0}  # bytes; the names of all others contain their bits
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
# The beginning of a statement. Other lines continue one (metadata of kernels have several lines).
_BEGINS = re.compile(r"  (ROOT )?%|\}$|\}, execution_thread=|$|%|ENTRY ")
_ENDS = re.compile(r"\}$|\}, execution_thread=")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", re.DOTALL)
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)")


class HloError(LlavaSPError, ValueError):
  """Reports text that is not an HLO module."""


@dataclasses.dataclass(frozen=True)
class HloArray:
  """Describes one array: the result of an operation, or an element of a tuple."""

  dtype: str
  dims: tuple[int, ...]
  space: int = 0  # memory space: 0 is HBM, 1 is VMEM, others are scalar memories

  @property
  def size(self) -> int:
    """Returns the number of elements, not their bytes."""
    return math.prod(self.dims)

  @property
  def nbytes(self) -> int:
    """Returns the size of the array in whole bytes, rounded up (s4 has half a byte an element)."""
    return math.ceil(self.size * width(self.dtype))


def width(dtype: str) -> float:
  """Returns the bytes of one element of an HLO dtype, which may be a fraction (s4: 0.5)."""
  if dtype in WIDTHS:
    return WIDTHS[dtype]
  bits = re.search(r"\d+", dtype)
  return int(bits.group()) / 8 if bits else 4


@dataclasses.dataclass(frozen=True)
class Op:
  """Holds one operation of a module: its kind, operands, and the shapes of its result."""

  name: str
  opcode: str
  arrays: tuple[HloArray, ...]  # of the result; several for a tuple
  operands: tuple[str, ...]
  attributes: str
  root: bool
  argument: str  # text between the parentheses: a parameter's number, a constant's value

  @functools.cached_property
  def called(self) -> dict[str, str]:
    """Returns the computations that the operation calls: {role: name}.

    The roles are "calls", "to_apply", "body" and "condition".
    """
    return {m.group(0).split("=")[0]: m.group(1) for m in _CALLED.finditer(self.attributes)}

  @functools.cached_property
  def op_name(self) -> str:
    """Returns the name of the operation in the traced program; "" if it has none."""
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
    return found.group(1) if found else ""

  def attribute(self, pattern: str) -> str:
    """Returns the first group of the regex `pattern` in the attributes; "" if it does not match."""
    found = re.search(pattern, self.attributes)
    return found.group(1) if found else ""

  @property
  def nbytes(self) -> int:
    """Returns the size of the result in bytes, of all arrays of a tuple."""
    return sum(a.nbytes for a in self.arrays)


@dataclasses.dataclass(frozen=True)
class Computation:
  """Holds one computation of a module."""

  name: str
  ops: tuple[Op, ...]  # in the order of the schedule

  @functools.cached_property
  def by_name(self) -> dict[str, Op]:
    """Returns {name: operation} of all operations."""
    return {op.name: op for op in self.ops}

  @functools.cached_property
  def users(self) -> dict[str, list[Op]]:
    """Returns {name of an operation: the operations that read its result}."""
    result: dict[str, list[Op]] = {}
    for op in self.ops:
      for operand in dict.fromkeys(op.operands):
        result.setdefault(operand, []).append(op)
    return result

  @functools.cached_property
  def parameters(self) -> dict[int, Op]:
    """Returns {number of a parameter: its operation}."""
    return {int(op.argument): op for op in self.ops if op.opcode == "parameter"}

  @property
  def root(self) -> Op:
    """Returns the operation whose result is that of the computation."""
    return next(op for op in self.ops if op.root)


@dataclasses.dataclass(frozen=True)
class Module:
  """Holds a module: its computations by name, and the entry computation."""

  computations: dict[str, Computation]
  entry: Computation

  def trip_count(self, loop: Op) -> int | None:
    """Returns the number of iterations of a `while` operation; None if it depends on values."""
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
  """Parses the text of a module. Raises: HloError for text that is not one."""
  computations: dict[str, Computation] = {}
  entry, name, ops = None, "", list[Op]()
  for line in _statements(text):
    header = _HEADER.match(line)
    if header and not line.startswith(" "):
      name, ops = header.group(2), []
      entry = name if header.group(1) else entry
    elif _ENDS.match(line) and name:
      computations[name] = Computation(name, tuple(ops))
      name = ""
    elif name and line.startswith("  "):
      ops.append(_op(line))
  if entry is None or entry not in computations:
    raise HloError("expected the text of an HLO module with an ENTRY computation")
  return Module(computations, computations[entry])


def _statements(text: str) -> Iterator[str]:
  """Yields headers, operations and closing braces, with the lines of each joined."""
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
  """Returns the index of the parenthesis that closes the one at `start`; skips strings.

  Raises: HloError when there is none.
  """
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


def _arrays(text: str) -> Iterator[HloArray]:
  for dtype, dims, layout in _ARRAY.findall(text):
    space = re.search(r"S\((\d+)\)", layout)
    sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
    yield HloArray(dtype, sizes, int(space.group(1)) if space else 0)
