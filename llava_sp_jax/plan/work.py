"""Counts matrix FLOPs, vector operations and HBM bytes of the operations of a scheduled module.

Looks into fusions: of an array that a fusion slices only the slice is read, and of an array that it
updates in place only the update is written. Arrays in VMEM cost no HBM bytes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from llava_sp_jax.plan.hlo import Computation, HloArray, Module, Op

HBM = 0  # memory space

# Opcode -> vector operations for each element; opcodes that are missing cost none.
ELEMENTWISE = {
  **dict.fromkeys(
    ("add", "subtract", "multiply", "maximum", "minimum", "negate", "abs", "and", "or", "xor",
     "not", "select", "compare", "convert", "shift-left", "shift-right-logical", "clamp",
     "shift-right-arithmetic", "floor", "ceil", "round-nearest-even", "is-finite", "sign",
     "reduce", "reduce-window", "dynamic-update-slice", "pad", "concatenate"), 1.0),
  **dict.fromkeys(("exponential", "log", "tanh", "rsqrt", "sqrt", "logistic"), 3.0),
  **dict.fromkeys(("divide", "remainder", "exponential-minus-one", "log-plus-one"), 5.0),
  **dict.fromkeys(("power", "erf", "sine", "cosine", "atan2", "cbrt"), 15.0),
}  # fmt: skip
FREE = frozenset({"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "iota",
                  "after-all", "partition-id", "replica-id", "opt-barrier"})  # fmt: skip
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Work:
  """Holds the work of one execution of an operation on one device."""

  flops: float = 0.0  # of matrix multiplications and convolutions
  low_flops: float = 0.0  # the part of `flops` with operands of 8 bits or fewer
  vector: float = 0.0  # elementwise operations
  read: float = 0.0  # HBM bytes
  written: float = 0.0

  @property
  def nbytes(self) -> float:
    """Returns the bytes that are read from HBM and written to it."""
    return self.read + self.written


class Worker:
  """Counts the work of a module's operations; caches the counts of computations."""

  def __init__(self, module: Module):
    self._module = module
    self._inner = functools.cache(self._inner_uncached)
    self._read = functools.cache(self._read_uncached)

  def of(self, op: Op, computation: Computation) -> Work:
    """Returns the work of one execution of an operation of `computation`."""
    if op.opcode in FREE:
      return Work()
    flops, low, vector = self._compute(op, computation)
    operands = [computation.by_name[name] for name in op.operands if name in computation.by_name]
    if op.opcode != "fusion":
      return Work(flops, low, vector, _plain_read(op, operands), _plain_written(op, operands))
    inner = op.called["calls"]
    passed = _passed_through(op)
    read = sum(
      min(self._read(inner, i), _hbm(operand.arrays))
      for i, operand in enumerate(operands)
      if i not in passed.values()
    )
    root = self._module.computations[inner]
    return Work(flops, low, vector, read, self._written(root, op, passed))

  def _compute(self, op: Op, computation: Computation) -> tuple[float, float, float]:
    """Returns (matrix FLOPs, those with operands of 8 bits or fewer, vector operations)."""
    if op.opcode == "fusion":
      return self._inner(op.called["calls"])
    if op.opcode in ("convolution", "dot"):
      flops = matmul_flops(op, computation)
      types = {computation.by_name[o].arrays[0].dtype for o in op.operands[:2]}
      low = types <= {"s8", "u8", "s4", "u4", "f8e4m3fn", "f8e5m2"}
      return flops, flops if low else 0.0, 0.0
    if op.opcode in ("reduce", "reduce-window") and op.operands[0] in computation.by_name:
      return 0.0, 0.0, float(computation.by_name[op.operands[0]].arrays[0].size)
    size = op.arrays[0].size if op.arrays else 0
    if op.opcode == "dynamic-update-slice":
      size = computation.by_name[op.operands[1]].arrays[0].size
    # The scalar unit computes scalars concurrently.
    return 0.0, 0.0, ELEMENTWISE.get(op.opcode, 0.0) * (size if size > 1 else 0)

  def _inner_uncached(self, name: str) -> tuple[float, float, float]:
    computation = self._module.computations[name]
    parts = [self._compute(op, computation) for op in computation.ops]
    flops, low, vector = (sum(column) for column in zip(*parts, strict=True))
    return flops, low, vector

  def _read_uncached(self, name: str, index: int) -> float:
    """Returns an upper bound of the bytes that a fusion reads of one of its parameters."""
    computation = self._module.computations[name]
    parameter = computation.parameters.get(index)
    if parameter is None:
      return math.inf
    return sum(
      self._use(user, parameter, computation) for user in computation.users.get(parameter.name, ())
    )

  def _use(self, user: Op, parameter: Op, computation: Computation) -> float:
    if user.opcode in _SLICES and user.operands[0] == parameter.name:
      return user.nbytes
    if user.opcode == "dynamic-update-slice" and user.operands[0] == parameter.name:
      return 0.0
    if user.opcode == "fusion":
      places = [i for i, name in enumerate(user.operands) if name == parameter.name]
      if places == [_aliased(user).get(0)]:  # another view of the same bytes
        return self._of_users(user, computation)
      return sum(self._read(user.called["calls"], i) for i in places)
    if user.opcode == "bitcast":
      return self._of_users(user, computation)
    if user.opcode == "tuple":
      return 0.0  # returned without being read
    return parameter.nbytes

  def _of_users(self, view: Op, computation: Computation) -> float:
    users = computation.users.get(view.name, ())
    return sum(self._use(u, view, computation) for u in users) if users else view.nbytes

  def _written(self, inner: Computation, op: Op, passed: dict[int, int]) -> float:
    root = inner.root
    parts = [root.name] if root.opcode != "tuple" else list(root.operands)
    total = 0.0
    for i, (name, array) in enumerate(zip(parts, op.arrays, strict=False)):
      if i in passed or array.space != HBM:
        continue
      total += self._updated(inner.by_name[name], inner) or array.nbytes
    return total

  def _updated(self, op: Op, computation: Computation) -> float:
    """Returns the bytes of the update if `op` updates an array in place; otherwise 0."""
    while op.opcode == "bitcast":
      op = computation.by_name[op.operands[0]]
    if op.opcode == "dynamic-update-slice":
      return computation.by_name[op.operands[1]].nbytes
    if op.opcode == "fusion":
      inner = self._module.computations[op.called["calls"]]
      if inner.root.opcode != "tuple":
        return self._updated(inner.root, inner)
    return 0.0


def _hbm(arrays: tuple[HloArray, ...]) -> int:
  return sum(a.nbytes for a in arrays if a.space == HBM)


def _plain_read(op: Op, operands: list[Op]) -> float:
  if op.opcode in _SLICES:
    return min(_hbm(operands[0].arrays), op.nbytes) if operands else 0.0
  if op.opcode == "dynamic-update-slice":
    return _hbm(operands[1].arrays)
  return sum(_hbm(operand.arrays) for operand in operands)


def _plain_written(op: Op, operands: list[Op]) -> float:
  if op.opcode == "dynamic-update-slice":
    return operands[1].nbytes if op.arrays[0].space == HBM else 0.0
  return _hbm(op.arrays)


def _passed_through(op: Op) -> dict[int, int]:
  """Returns {index of the result: operand} for values that a fusion only passes on.

  These are the state of asynchronous collectives.
  """
  if "continuation_config" not in op.attributes and "async-collective" not in op.name:
    return {}
  return _aliased(op)


def _aliased(op: Op) -> dict[int, int]:
  """Returns {index of the result: operand} for results that are the memory of an operand."""
  text = op.attribute(r"output_to_operand_aliasing=\{(.*?)\}, calls")
  return {int(o or 0): int(i) for o, i in re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", text)}


def matmul_flops(op: Op, computation: Computation) -> float:
  """Returns the FLOPs of a `convolution` or `dot`: twice its multiply-adds.

  TPU modules express a batched product as a convolution with a dilated window; products with
  padding or with the zeros of dilation are not counted.
  """
  left = computation.by_name[op.operands[0]].arrays[0]
  right = computation.by_name[op.operands[1]].arrays[0]
  out = op.arrays[0]
  if op.opcode == "dot":
    contracted = [
      int(d) for d in op.attribute(r"lhs_contracting_dims=\{([\d,]*)\}").split(",") if d
    ]
    return 2.0 * out.size * math.prod(left.dims[d] for d in contracted)
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
  if labels is None:
    return 0.0
  of_left, of_right, of_out = labels.groups()
  window = _window(op.attributes)
  total = 2.0 * out.dims[of_out.index("b")] * out.dims[of_out.index("f")]
  total *= right.dims[of_right.index("i")]
  for d in (label for label in of_out if label.isdigit()):
    sizes = (left.dims[of_left.index(d)], right.dims[of_right.index(d)], out.dims[of_out.index(d)])
    total *= _overlaps(*sizes, *(values[int(d)] for values in window.values()) if window else ())
  return total


def _window(attributes: str) -> dict[str, list[int]]:
  """Returns how a convolution's window moves: one number for each spatial dimension.

  The keys are stride, low (padding before the input), left (dilation of the input) and right
  (dilation of the kernel), with HLO's defaults for what is not given. Returns {} if `attributes`
  has no window.
  """
  text = re.search(r"window=\{([^}]*)\}", attributes)
  if text is None:
    return {}
  fields = dict(item.split("=") for item in text.group(1).split())
  rank = len(fields["size"].split("x"))

  def numbers(key: str, default: str) -> list[int]:
    return [int(v.split("_")[0]) for v in fields.get(key, "x".join([default] * rank)).split("x")]

  return {
    "stride": numbers("stride", "1"),
    "low": numbers("pad", "0"),
    "left": numbers("lhs_dilate", "1"),
    "right": numbers("rhs_dilate", "1"),
  }


@functools.cache
def _overlaps(
  size: int, kernel: int, out: int, stride: int = 1, low: int = 0, left: int = 1, right: int = 1
) -> int:
  """Counts pairs (output position, kernel position) that read an element of the input.

  Pairs that read padding or a zero of dilation are not counted.
  """
  end, count = (size - 1) * left, 0
  if out * kernel > 1 << 22:  # an approximation for large windows, where padding hardly matters
    return out * kernel // left
  for o in range(out):
    for k in range(kernel):
      place = o * stride - low + k * right
      count += 0 <= place <= end and place % left == 0
  return count
