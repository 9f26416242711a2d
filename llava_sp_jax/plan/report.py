"""Formats plans: memory against the limit, FLOPs, collectives, step time, method of prediction."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax import provenance
from llava_sp_jax.hardware import GIB
from llava_sp_jax.plan import cost as cost_lib
from llava_sp_jax.plan.compile import Compiled, PlanError
from llava_sp_jax.plan.topologies import Topology

# The program, scratch of collectives and the runtime's memory are not in the buffer assignment.
RESERVE = int(0.35 * GIB)
PREDICTORS = {
  "fast": "schedule walk, FLOPs at 93% of peak",
  "full": "schedule walk, the compiler's cycles for matmuls",
  "none": "memory only",
}
# Identify a record; a new one replaces its old.
RECORD_KEYS = ("model", "topology", "what", "rows", "weights", "cache")
FLOATS = {"weights": "none", "cache": "float"}  # formats that a record does not name

# (section, regex over an entry's traced name; over its kind for a regex that begins with ^)
SECTIONS: tuple[tuple[str, str], ...] = (
  ("waiting for collectives", r"^wait:(?!copy)"),
  ("waiting for copies", r"^wait:copy"),
  ("loss and head", r"logits|lm_head|loss"),
  ("attention", r"splash|BTNH|BNTS|attend|layers/vmap|softmax"),
  ("adapters", r"_proj/dot_general|lora|Dropout"),
  ("decoder matmuls and norms", r"language_model"),
  ("vision tower", r"vision_tower"),
  ("projector", r"projector"),
  ("optimizer and rest", r""),
)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Holds the prediction for one config on one topology."""

  config: config_lib.Config
  topology: Topology
  what: str  # "train" or "eval"
  compiled: Compiled
  cost: cost_lib.Cost | None  # None: only memory is predicted

  @property
  def limit(self) -> int:
    """Returns the HBM of a chip that a program may use, in bytes."""
    return self.topology.chip.hbm_bytes

  @property
  def used(self) -> int:
    """Returns the HBM that the program and the runtime need on a chip, in bytes."""
    extra = RESERVE if self.compiled.module else 0
    return self.compiled.memory.total + extra

  @property
  def fits(self) -> bool:
    """Returns whether the program fits into the HBM of a chip."""
    return self.used <= self.limit

  @property
  def seconds(self) -> float:
    """Returns the seconds of a train step, or of an evaluation's prefill; nan if not predicted."""
    return self.cost.seconds if self.cost else math.nan

  @property
  def mfu(self) -> float:
    """Returns the model FLOPs utilization of a train step, a share; nan if no time is predicted."""
    peak = self.topology.chips * self.topology.chip.peak_flops
    result: float = self.compiled.about.get("useful_flops", 0.0) / (peak * self.seconds)
    return result

  @property
  def predictor(self) -> str:
    """Returns how the time is predicted: "fast", "full" or "none", a key of PREDICTORS."""
    if self.cost is None:
      return "none"
    return "full" if self.compiled.full else "fast"

  @property
  def tokens(self) -> int:
    """Returns the number of tokens of a step: rows times row length."""
    return self.config.train.batch_size * self.config.data.row_length

  def record(self) -> dict[str, Any]:
    """Returns the plan as a row for the JSON file; its times are None unless the plan fits."""
    speed = self.fits and not math.isnan(self.seconds)
    train = speed and self.what == "train"
    config = self.config
    result = {
      "model": config.name,
      "topology": self.topology.name,
      "what": self.what,
      "rows": config.train.batch_size,
      "row_length": config.data.row_length,
      "images_per_row": config.data.images_per_row,
      "step_seconds": round(self.seconds, 4) if speed else None,
      "mfu": round(self.mfu, 4) if train else None,
      "tokens_per_second": round(self.tokens / self.seconds) if speed else None,
      "hbm_gib": round(self.used / GIB, 2),
      "hbm_limit_gib": round(self.limit / GIB, 2),
      "fits": self.fits,
      "predictor": PREDICTORS[self.predictor if speed else "none"],
      "mesh": self.compiled.about.get("mesh"),
    }
    if self.cost and self.cost.loops:
      result["decode_step_seconds"] = round(self._decode_seconds(), 6)
    if self.what == "eval":
      from llava_sp_jax.plan import traffic

      found = traffic.of(config.model)
      held = {"weights": config.model.quantize, "cache": config.model.cache}
      result |= {key: form for key, form in held.items() if form != FLOATS[key]}
      result["decode_bytes"] = found.step(config.train.batch_size, config.data.row_length)
    return result

  def _decode_seconds(self) -> float:
    return (
      max((loop.seconds for loop in self.cost.loops.values()), default=0.0) if self.cost else 0.0
    )


def make(config: config_lib.Config, topology: Topology, what: str, compiled: Compiled) -> Plan:
  """Makes the plan of a compiled program; predicts its time if schedule and rates are known.

  `what` is "train" or "eval".
  """
  cost = None
  if compiled.module and topology.chip.speed:
    walk = cost_lib.Predictor(compiled.module, topology, compiled.about["coordinates"])
    cost = walk.run()
  return Plan(config, topology, what, compiled, cost)


def text(plan: Plan, top: int = 15) -> str:
  """Returns the whole report as text, with the `top` longest operations."""
  return "\n".join([*_head(plan), *_memory(plan), *_speed(plan, top)])


def refusal(plan: Plan) -> PlanError:
  """Returns the error of a plan that does not fit, with what is missing and the largest buffers."""
  memory = plan.compiled.memory
  lines = [
    f"does not fit: {plan.used / GIB:.2f} GiB of HBM per chip on {plan.topology.name}, "
    f"{plan.limit / GIB:.2f} GiB there; {(plan.used - plan.limit) / GIB:.2f} GiB too many",
    *[f"  {size / GIB:6.2f} GiB  {part}" for part, size in _sorted(memory.parts)],
    "the largest buffers:",
    *[f"  {size / GIB:6.2f} GiB  {shape}  {_short(name)}" for size, shape, name in memory.largest],
    "fewer rows (train.batch_size), more accumulation or recomputation, or a larger slice make room",
  ]
  return PlanError("\n".join(lines))


def _head(plan: Plan) -> list[str]:
  about, config, topology = plan.compiled.about, plan.config, plan.topology
  mesh = " x ".join(f"{k} {v}" for k, v in about.get("mesh", {}).items())
  counts = ", ".join(f"{k} {v / 1e6:,.0f} M" for k, v in about.get("parameters", {}).items())
  return [
    f"{config.name}, {plan.what}, on {topology.name}: {topology.chips} chips {topology.chip_name} "
    f"({'x'.join(map(str, topology.sides))}), mesh {mesh}",
    f"parameters: {counts}",
    f"{config.train.batch_size} rows of {config.data.row_length} tokens with "
    f"{config.data.images_per_row} images; compiled in {plan.compiled.seconds:.0f} s",
    *(_traffic(config) if plan.what == "eval" else ()),
    "",
  ]


def _traffic(config: config_lib.Config) -> list[str]:
  from llava_sp_jax.plan import traffic

  found, rows, length = traffic.of(config.model), config.train.batch_size, config.data.row_length
  return [
    f"weights {config.model.quantize}, cache {config.model.cache}: a decode step has to read "
    f"{found.step(rows, length) / GIB:.3f} GiB on all chips, {found.weights / GIB:.3f} of weights, "
    f"the rest keys and values of {length} positions a row, {found.position:,} bytes each"
  ]


def _memory(plan: Plan) -> list[str]:
  parts = _sorted(plan.compiled.memory.parts)
  if plan.compiled.module:
    parts.append(("program and runtime (reserved)", RESERVE))
  return [
    f"HBM per device {plan.used / GIB:.2f} of {plan.limit / GIB:.2f} GiB",
    *[f"  {size / GIB:7.3f} GiB  {part}" for part, size in parts],
    *(["the largest temporaries:"] if plan.compiled.memory.largest else []),
    *[
      f"  {size / GIB:7.3f} GiB  {shape}  {_short(name)}"
      for size, shape, name in plan.compiled.memory.largest[:5]
    ],
    "",
  ]


def _speed(plan: Plan, top: int) -> list[str]:
  cost, chip = plan.cost, plan.topology.chip
  if cost is None:
    return [f"no speed is predicted for {plan.topology.name}: the compiler gives its memory only"]
  lines = [f"{'prefill' if plan.what == 'eval' else 'step'} {plan.seconds:.4f} s predicted"]
  lines += [
    f"  {plan.tokens / plan.seconds:,.0f} tokens/s, "
    f"{plan.tokens / plan.seconds / plan.topology.chips:,.0f} per chip"
  ]
  if plan.what == "train":
    useful, all_flops = plan.compiled.about["useful_flops"], cost.flops * plan.topology.chips
    config = plan.config
    days = plan.seconds * config.train.steps / 86400
    lines += [
      f"  MFU {plan.mfu:.3f} = useful FLOPs / (step seconds x {plan.topology.chips} chips x "
      f"{chip.peak_flops / 1e12:.0f} TFLOP/s)",
      f"  useful FLOPs {useful:.3e} (4N per token for frozen kernels, 6N for trainable ones, 2N in "
      "the frozen tower, causal attention)",
      f"  matmul FLOPs compiled {all_flops:.3e}: useful share {useful / max(all_flops, 1):.3f}",
      f"  the recipe's {config.train.steps:,} steps: {days:.2f} days, "
      f"{days * 24 * plan.topology.chips:,.0f} chip hours",
    ]
  for name, loop in cost.loops.items():
    rows = plan.config.train.batch_size
    lines += [
      f"one iteration of the loop {_short(name)}: {loop.seconds * 1e3:.3f} ms, "
      f"{rows / max(loop.seconds, 1e-12):,.0f} tokens/s",
      *_top(loop, top // 3),
    ]
  lines += ["", *_collectives(cost), "", *_sections(cost), "", *_top(cost, top), ""]
  lines += [
    f"how: {PREDICTORS[plan.predictor]} ({chip.peak_flops / 1e12:.0f} TFLOP/s), HBM {chip.hbm_rate / 1e9:.0f} "
    f"GB/s, link {chip.link_rate / 1e9:.0f} GB/s, vector unit {chip.vector_rate / 1e12:.1f} Top/s; "
    "collectives run beside what the schedule puts between their start and done",
  ]
  if cost.unknown:
    lines += [f"kernels without a row in plan/kernels.py, counted by their bytes: {cost.unknown}"]
  return lines


def _collectives(cost: cost_lib.Cost) -> list[str]:
  lines = [f"{'collective':<20}{'GB received':>12}{'times':>8}{'wire s':>9}{'waited s':>9}"]
  for kind, (size, count, wire, waited) in sorted(cost.collectives.items()):
    lines.append(f"{kind:<20}{size / 1e9:>12.3f}{count:>8.0f}{wire:>9.4f}{waited:>9.4f}")
  return lines


def _sections(cost: cost_lib.Cost) -> list[str]:
  seconds = dict.fromkeys((name for name, _ in SECTIONS), 0.0)
  for entry in cost.entries:
    seconds[section(entry)] += entry.seconds
  total = max(cost.seconds, 1e-12)
  rows = [f"  {s:8.4f} s {s / total:6.1%}  {name}" for name, s in seconds.items() if s]
  return ["where the time goes:", *rows]


def section(entry: cost_lib.Entry) -> str:
  """Returns the name of the section of the report, in SECTIONS, to which an operation belongs."""
  return next(
    name
    for name, pattern in SECTIONS
    if re.search(pattern, entry.kind if pattern.startswith("^") else entry.op_name or entry.name)
  )


def _top(cost: cost_lib.Cost, top: int) -> list[str]:
  lines = [
    f"the {top} longest operations:",
    f"  {'seconds':>9}{'times':>6}  {'limit':<16}{'TFLOP':>8}{'GB':>8}  operation",
  ]
  for e in sorted(cost.entries, key=lambda e: -e.seconds)[:top]:
    lines.append(
      f"  {e.seconds:>9.5f}{e.count:>6.0f}  {e.kind:<16}{e.flops / 1e12:>8.3f}"
      f"{e.nbytes / 1e9:>8.3f}  {e.name}  {_short(e.op_name)}"
    )
  return lines


def _short(name: str) -> str:
  """Removes from a traced name the wrappers that all operations share."""
  name = re.sub(r"jit\(run\)/|closed_call/|while/body/|LlavaSP\.\w+/", "", name)
  name = re.sub(r"transpose\(jvp\(LlavaSP\)\)", "backward", name)
  return re.sub(r"jvp\(LlavaSP\)", "forward", name)


def _sorted(parts: dict[str, int]) -> list[tuple[str, int]]:
  return sorted(parts.items(), key=lambda item: -item[1])


def append(out: Path, record: dict[str, Any]) -> list[dict[str, Any]]:
  """Adds a record to OUT.json and returns all records.

  It replaces an older one with the same model, topology, what and rows.
  """
  records = provenance.read(out, [])
  key = [record.get(k) for k in RECORD_KEYS]
  records = [r for r in records if [r.get(k) for k in RECORD_KEYS] != key] + [record]
  provenance.write(out, records, beside=True)
  return records


def table(records: list[dict[str, Any]]) -> str:
  """Returns the text of OUT.md: a table in markdown with a row for each record."""
  lines = [
    "# Plans for absent chips",
    "",
    "Made by `llava-sp plan`: the real step, compiled by the real compiler for chips that were not "
    "there. Times are predicted, not measured.",
    "",
    "| model | topology | what | rows | s/step | MFU | tokens/s | HBM GiB | of | predictor |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for r in records:
    held = [r[key] for key in FLOATS if key in r]
    cells = [
      " ".join([r["model"], *held]),
      r["topology"],
      r["what"],
      r["rows"],
      r["step_seconds"],
      r["mfu"],
      r["tokens_per_second"],
      r["hbm_gib"],
      r["hbm_limit_gib"],
      r["predictor"],
    ]
    if not r["fits"]:
      cells[4:7] = ["does not fit", None, None]
    lines.append("| " + " | ".join("-" if c is None else str(c) for c in cells) + " |")
  return "\n".join(lines) + "\n"
