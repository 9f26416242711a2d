"""Predicts the time of a scheduled module by a walk along its schedule.

Matrix units, vector unit and HBM work concurrently within an operation, which takes the longest of
the three times. Asynchronous collectives and copies overlap with the operations between their start
and their done; only the rest of their time is waited for at the done. So do transfers to other slices,
which begin at their send and are waited for at the done of their receive. The body of a loop is counted
once for each iteration. Copies and operations share the HBM, so neither an iteration nor a program
is faster than all of its bytes at the HBM rate.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from llava_sp_jax.hardware import Chip
from llava_sp_jax.plan import groups, kernels
from llava_sp_jax.plan.hlo import Computation, HloError, Module, Op
from llava_sp_jax.plan.topologies import Topology
from llava_sp_jax.plan.work import FREE, Work, Worker

MATRIX_SHARE = 0.93  # share of the peak that large matmuls reach in the compiler's own estimates
LATENCY = 1e-6  # seconds, of a collective
ROUNDING = 1e-12  # seconds, of sums

# kind -> function (bytes of input, bytes of output, devices) -> bytes that a device receives
COLLECTIVES: dict[str, Callable[[float, float, int], float]] = {
  "all-gather": lambda i, o, n: o * (n - 1) / n,
  "reduce-scatter": lambda i, o, n: i * (n - 1) / n,
  "all-reduce": lambda i, o, n: 2 * i * (n - 1) / n,
  "all-to-all": lambda i, o, n: i * (n - 1) / n,
  "ragged-all-to-all": lambda i, o, n: i * (n - 1) / n,
  "collective-permute": lambda i, o, n: o,
}
SLOW = "between slices"  # the kind of transfers over the data-center network
SLOW_KINDS = {"one-to-one": "collective-permute"}  # what a transfer between slices calls itself
COPIES = ("copy-start", "slice-start", "async-start")  # asynchronous until their done
UNTIMED = ("async-update", "custom-call", "recv")


@dataclasses.dataclass
class Entry:
  """Holds the cost of one operation of the schedule, summed over its executions."""

  name: str
  op_name: str
  kind: str  # matmul, vector, memory, kernel, wait:<collective>, wait:copy, wait:hbm
  seconds: float
  flops: float = 0.0
  nbytes: float = 0.0
  count: float = 1.0


@dataclasses.dataclass
class Cost:
  """Holds the cost of a computation on one device."""

  seconds: float = 0.0
  flops: float = 0.0
  hbm_bytes: float = 0.0
  entries: list[Entry] = dataclasses.field(default_factory=list)
  collectives: dict[str, list[float]] = dataclasses.field(default_factory=dict)
  # kind -> [bytes received, executions, seconds on the wires, seconds waited for]
  loops: dict[str, Cost] = dataclasses.field(default_factory=dict)  # name -> cost of one iteration,
  # for loops whose number of iterations is unknown; not part of the sums
  unknown: list[str] = dataclasses.field(default_factory=list)  # kernels counted by bytes alone
  wire_seconds: float = 0.0

  def add(self, other: Cost, times: float) -> None:
    """Adds the cost of `times` executions of another computation."""
    self.seconds += other.seconds * times
    self.flops += other.flops * times
    self.hbm_bytes += other.hbm_bytes * times
    self.wire_seconds += other.wire_seconds * times
    for e in other.entries:
      self.entries.append(
        dataclasses.replace(
          e,
          seconds=e.seconds * times,
          flops=e.flops * times,
          nbytes=e.nbytes * times,
          count=e.count * times,
        )
      )
    for kind, values in other.collectives.items():
      self._collective(kind, [v * times for v in values])
    self.loops.update(other.loops)
    self.unknown += [name for name in other.unknown if name not in self.unknown]

  def _collective(self, kind: str, values: list[float]) -> None:
    old = self.collectives.setdefault(kind, [0.0] * 4)
    self.collectives[kind] = [a + b for a, b in zip(old, values, strict=True)]

  def collective(self, kind: str, size: float, seconds: float) -> None:
    """Counts the start of a collective: `size` bytes received, `seconds` on the wires."""
    self._collective(kind, [size, 1.0, seconds, 0.0])
    self.wire_seconds += seconds

  def exchange(self, size: float, seconds: float) -> None:
    """Counts a transfer between slices, which is not on the wires of a slice."""
    self._collective(SLOW, [size, 1.0, seconds, 0.0])

  def waited(self, kind: str, seconds: float) -> None:
    """Counts `seconds` in which a device waited for a collective."""
    self._collective(kind, [0.0, 0.0, 0.0, seconds])


@dataclasses.dataclass(frozen=True)
class Collective:
  """Holds what a collective costs a device."""

  kind: str
  nbytes: float  # received by a device
  seconds: float
  key: str  # equal at start and done


class Predictor:
  """Predicts the cost of a module on a topology."""

  def __init__(
    self,
    module: Module,
    topology: Topology,
    coordinates: list[list[int]],
    row: kernels.Row = kernels.FULL,
  ):
    """Stores its arguments.

    `coordinates[i]` is where partition i's chip is in the interconnect, `row` what rows hold.
    """
    self._module, self._topology, self._coordinates = module, topology, coordinates
    self._row = row
    self._worker = Worker(module)

  def run(self) -> Cost:
    """Returns the cost of one execution of the module on one device."""
    return self._walk(self._module.entry)

  def _walk(self, computation: Computation) -> Cost:
    cost = Cost()
    now, wires, copies, slow = 0.0, 0.0, 0.0, 0.0
    running: dict[str, tuple[str, float]] = {}  # key -> (kind, time of its end)
    for op in computation.ops:
      if op.opcode in FREE:
        continue
      if op.opcode == "while":
        body = self._walk(self._module.computations[op.called["body"]])
        turns = self._module.trip_count(op)
        if turns is None:
          cost.loops[op.op_name or op.name] = body
        else:
          cost.add(body, turns)
          now += body.seconds * turns
        continue
      if op.opcode in ("call", "conditional"):
        branches = [self._walk(self._module.computations[n]) for n in _branches(op)]
        longest = max(branches, key=lambda c: c.seconds)
        cost.add(longest, 1)
        now += longest.seconds
        continue
      collective = self._collective(op, computation)
      if collective and _is_done(op):
        kind, end = running.pop(collective.key, (collective.kind, now))
        now = self._wait(cost, op, kind, now, end)
      elif collective:
        wires = max(now, wires) + collective.seconds
        cost.collective(collective.kind, collective.nbytes, collective.seconds)
        if _is_start(op):
          running[collective.key] = running[op.name] = (collective.kind, wires)
        else:
          now = self._wait(cost, op, collective.kind, now, wires)
      elif op.opcode == "send":
        size = self._exchanged(op, computation)
        seconds = size / self._topology.chip.slow_rate + LATENCY
        slow = max(now, slow) + seconds
        cost.exchange(size, seconds)
        running[_rendezvous(op)] = (SLOW, slow)
      elif op.opcode == "recv-done":
        key = _rendezvous(computation.by_name[op.operands[0]])
        kind, end = running.pop(key, (SLOW, now))
        now = self._wait(cost, op, kind, now, end)
      elif op.opcode in COPIES:
        work = self._copied(op, computation)
        copies = max(now, copies) + work / self._topology.chip.hbm_rate
        running[op.name] = ("copy", copies)
        cost.hbm_bytes += work
      elif op.opcode.endswith("-done"):
        kind, end = running.pop(op.operands[0], ("copy", now))
        now = self._wait(cost, op, kind, now, end)
      elif op.opcode not in UNTIMED or kernels.is_kernel(op):
        now += self._run(cost, op, computation)
    # Transfers that are still on the wires at the end are waited for.
    left = max(cost.wire_seconds - now, 0.0)
    if left > 0:
      now = self._wait_end(cost, now, left)
    least = cost.hbm_bytes / self._topology.chip.hbm_rate
    if least - now > ROUNDING:
      cost.entries.append(Entry("copies beside operations", "", "wait:hbm", least - now))
    cost.seconds = max(now, least)
    return cost

  def _run(self, cost: Cost, op: Op, computation: Computation) -> float:
    work = self._worker.of(op, computation)
    chip = self._topology.chip
    seconds, kind = duration(work, chip)
    cycles = op.attribute(r'"estimated_cycles":"(\d+)"')
    if cycles and work.flops:  # exists only after code generation; too high for loop fusions
      seconds, kind = max(int(cycles) / chip.clock, work.nbytes / chip.hbm_rate), "matmul"
    if kernels.is_kernel(op):
      flops, share = kernels.flops(op, computation, self._row)
      kind = "kernel"
      work = dataclasses.replace(work, flops=flops, vector=kernels.vector(op, computation))
      computing = flops / (share * chip.peak_flops) + work.vector / chip.vector_rate
      seconds = max(computing, work.nbytes / chip.hbm_rate)
      if not flops:
        cost.unknown.append(op.op_name or op.name)
    if seconds:
      cost.entries.append(Entry(op.name, op.op_name, kind, seconds, work.flops, work.nbytes))
    cost.flops += work.flops
    cost.hbm_bytes += work.nbytes
    return seconds

  def _wait(self, cost: Cost, op: Op, kind: str, now: float, end: float) -> float:
    if end > now:
      cost.entries.append(Entry(op.name, op.op_name, f"wait:{kind}", end - now))
      if kind in COLLECTIVES or kind == SLOW:
        cost.waited(kind, end - now)
    return max(now, end)

  def _wait_end(self, cost: Cost, now: float, left: float) -> float:
    cost.entries.append(Entry("remaining transfers", "", "wait:wires", left))
    return now + left

  def _copied(self, op: Op, computation: Computation) -> float:
    """Returns the HBM bytes that a copy or slice moves."""
    sizes = sorted(a.nbytes for a in op.arrays if a.dims)
    return sizes[0] if sizes else 0.0

  def _exchanged(self, op: Op, computation: Computation) -> float:
    """Returns the bytes that a chip receives from other slices; none of a transfer to its host.

    Raises: HloError for a kind of transfer that COLLECTIVES does not have, or without an answer.
    """
    named = op.attribute(r'_xla_megascale_transfer_type="(\w+)"')
    if not named:
      return 0.0
    kind = named.lower().replace("_", "-")
    received = COLLECTIVES.get(SLOW_KINDS.get(kind, kind))
    answers = [
      other.arrays[0].nbytes
      for other in computation.ops
      if other.opcode == "recv" and _rendezvous(other) == _rendezvous(op)
    ]
    if not received or not answers:
      raise HloError(
        f"{op.name}: a transfer {named} between slices, which this version cannot read"
      )
    return received(computation.by_name[op.operands[0]].nbytes, answers[0], self._topology.slices)

  def _collective(self, op: Op, computation: Computation) -> Collective | None:
    inner, where = op, computation
    base = op.opcode.removesuffix("-start").removesuffix("-done")
    if op.opcode in ("fusion", "async-start", "async-done") and op.called.get("calls"):
      where = self._module.computations[op.called["calls"]]
      while where.root.opcode == "call":  # of a program for the sparse cores
        where = self._module.computations[where.root.called["to_apply"]]
      found = [o for o in where.ops if o.opcode.removesuffix("-start") in COLLECTIVES]
      if not found or "continuation_config" in op.attributes:
        return None  # a matmul fused with a collective, whose start and done are counted
      inner, base = found[0], found[0].opcode.removesuffix("-start")
    if base not in COLLECTIVES:
      return None
    if op.opcode.endswith("-done") and inner is op:
      return Collective(base, 0.0, 0.0, op.operands[0])
    operands = [where.by_name[n] for n in inner.operands if n in where.by_name]
    size_in = float(sum(o.nbytes for o in operands))
    # The result of a start contains its operands as well as its results.
    size_out = inner.nbytes - size_in if inner.opcode.endswith("-start") else float(inner.nbytes)
    scattered = base == "all-reduce" and inner is not op and op.nbytes < size_in
    kind = "reduce-scatter" if scattered and not _is_start(op) else base
    group = groups.first(inner.attributes, len(self._coordinates))
    received = COLLECTIVES[kind](size_in, size_out, max(len(group), 1))
    rate = self._topology.ring_rate(self._varying(group))
    key = inner.attribute(r"channel_id=(\d+)") if inner is not op else op.name
    return Collective(kind, received, received / rate + LATENCY if len(group) > 1 else 0.0, key)

  def _varying(self, group: list[int]) -> tuple[bool, ...]:
    places = [self._coordinates[i] for i in group]
    sides = range(len(self._topology.sides))
    return tuple(len({place[d] for place in places if d < len(place)}) > 1 for d in sides)


def duration(work: Work, chip: Chip) -> tuple[float, str]:
  """Returns the seconds of an operation and the unit that limits it: matmul, vector or memory.

  Not for collectives and kernels.
  """
  matrix = (work.flops - work.low_flops / 2) / (MATRIX_SHARE * chip.peak_flops)
  times = {
    "matmul": matrix,
    "vector": work.vector / chip.vector_rate,
    "memory": work.nbytes / chip.hbm_rate,
  }
  slowest = max(times, key=lambda k: times[k])
  return times[slowest], slowest


def _rendezvous(op: Op) -> str:
  """Returns the name that a send and the receive of its answer share."""
  return op.attribute(r'_xla_host_transfer_rendezvous="([^"]*)"')


def _branches(op: Op) -> list[str]:
  named = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
  if named:
    return re.findall(r"%([\w.\-]+)", named.group(1))
  both = re.findall(r"(?:true|false)_computation=%([\w.\-]+)", op.attributes)
  return both or list(op.called.values())


def _is_start(op: Op) -> bool:
  return op.opcode.endswith("-start") or op.name.startswith("async-collective-start")


def _is_done(op: Op) -> bool:
  return op.opcode.endswith("-done") or op.name.startswith("async-collective-done")
