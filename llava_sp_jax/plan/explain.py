"""Explains plans as text: memory against the limit, FLOPs, collectives, where the time goes."""

from __future__ import annotations

import math
import re

from llava_sp_jax.hardware import GIB
from llava_sp_jax.plan import calibration
from llava_sp_jax.plan import cost as cost_lib
from llava_sp_jax.plan.compile import EVAL, TRAIN, PlanError
from llava_sp_jax.plan.report import FLOATS, LOOP, PREDICTORS, Plan, Program

ADAPTERS = "adapters"
# (section, regex over an entry's traced name; over its kind for a regex that begins with ^)
SECTIONS: tuple[tuple[str, str], ...] = (
  ("waiting for copies", r"^wait:(copy|hbm)"),
  ("waiting for collectives", r"^wait:"),
  ("loss and head", r"logits|lm_head|loss"),
  ("attention", r"splash|BTNH|BNTS|bkq|attend|layers/vmap|softmax"),
  (ADAPTERS, r"_proj/dot_general|lora|Dropout"),
  ("decoder matmuls and norms", r"language_model"),
  ("vision tower", r"vision_tower"),
  ("projector", r"projector"),
  ("optimizer and rest", r""),
)
# What makes room, by --what.
ADVICE = {
  TRAIN: "fewer rows (train.batch_size), more accumulation or recomputation, or a larger slice make "
  "room",
  EVAL: "fewer rows (train.batch_size), shorter prompts (data.row_length), a larger mesh.tensor, "
  "--weights int8 and --cache int8, or a larger slice make room",
}
# What a program of an evaluation does.
DOES = {
  TRAIN: "",
  "encode": "encodes the images of prompts, some at a time",
  "grow": "prefills what prompts share: text and images",
  "admit": "prefills the rest of the prompts of all rows, and chooses their first tokens",
  LOOP: "adds a token to every row",
}


def text(plan: Plan, top: int = 15) -> str:
  """Returns the whole report as text, with the `top` longest operations."""
  lines = _head(plan)
  for name, program in plan.programs.items():
    if DOES[name]:
      lines += [f"{name}: {DOES[name]}; compiled in {program.compiled.seconds:.0f} s", ""]
    lines += [*_memory(plan, program), *_speed(plan, name, top)]
  return "\n".join([*lines, *_how(plan)])


def refusal(plan: Plan) -> PlanError:
  """Returns the error of a plan that does not fit, with what is missing and the largest buffers."""
  program = plan.largest
  name = next(name for name, found in plan.programs.items() if found is program)
  largest = program.compiled.memory.largest
  lines = [
    f"does not fit: {plan.used / GIB:.2f} GiB of HBM per device on {plan.topology.name}, "
    f"{plan.limit / GIB:.2f} GiB there; {(plan.used - plan.limit) / GIB:.2f} GiB too many"
    + (f", in the program {name} ({DOES[name]})" if DOES[name] else ""),
    *_options(plan),
    *_parts(program),
    *(["the largest buffers:"] if largest else []),
    *[f"  {size / GIB:7.3f} GiB  {shape}  {_short(name)}" for size, shape, name in largest],
    ADVICE[plan.what],
  ]
  return PlanError("\n".join(lines))


def _head(plan: Plan) -> list[str]:
  about, config, topology = plan.about, plan.config, plan.topology
  mesh = " x ".join(f"{k} {v}" for k, v in about.get("mesh", {}).items())
  counts = ", ".join(f"{k} {v / 1e6:,.0f} M" for k, v in about.get("parameters", {}).items())
  sides = "x".join(map(str, topology.sides))
  slices = f"{topology.slices} slices of " if topology.slices > 1 else ""
  settings = (
    f"accumulate {config.train.accumulate}, remat {config.model.remat}, base {config.mesh.base}, "
    f"quantize {config.model.quantize}"
  )
  seconds = sum(program.compiled.seconds for program in plan.programs.values())
  return [
    f"{config.name}, {plan.what}, on {topology.name}: {topology.chips} chips {topology.chip_name} "
    f"({slices}{sides}), mesh {mesh}" + (f", {settings}" if plan.what == TRAIN else ""),
    f"parameters: {counts}",
    *_options(plan),
    f"{plan.rows} rows of {config.data.row_length} tokens with "
    f"{config.data.images_per_row} images; compiled in {seconds:.0f} s",
    *(_traffic(plan) if plan.what == EVAL else ()),
    "",
  ]


def _options(plan: Plan) -> list[str]:
  chosen = plan.about.get("options")
  return [f"with your options of the compiler: {chosen}"] if chosen else []


def _traffic(plan: Plan) -> list[str]:
  from llava_sp_jax.plan import traffic

  model, rows, length = plan.config.model, plan.rows, plan.config.data.row_length
  found = traffic.of(model)
  return [
    f"weights {model.quantize}, cache {model.cache}: a decode step has to read "
    f"{found.step(rows, length) / GIB:.3f} GiB on all chips, {found.weights / GIB:.3f} of weights, "
    f"the rest keys and values of {length} positions a row, {found.position:,} bytes each"
  ]


def _parts(program: Program) -> list[str]:
  parts = sorted(program.parts.items(), key=lambda item: -item[1])
  return [f"  {size / GIB:7.3f} GiB  {part}" for part, size in parts]


def _memory(plan: Plan, program: Program) -> list[str]:
  largest = program.compiled.memory.largest
  return [
    f"HBM per device {program.used / GIB:.2f} of {plan.limit / GIB:.2f} GiB",
    *_parts(program),
    *(["the largest temporaries:"] if largest else []),
    *[f"  {size / GIB:7.3f} GiB  {shape}  {_short(name)}" for size, shape, name in largest[:5]],
    "",
  ]


def _speed(plan: Plan, name: str, top: int) -> list[str]:
  program = plan.programs[name]
  cost = program.cost
  if cost is None:
    return [f"no speed is predicted for {plan.topology.name}: the compiler gives its memory only"]
  lines = _training(plan, cost) if name == TRAIN else _answering(plan, name, program)
  if name == LOOP:
    cost = next(iter(cost.loops.values()), cost)
  adapters = plan.config.model.lora.rank > 0 and (
    name == TRAIN or plan.config.model.quantize != FLOATS["weights"]
  )
  lines += ["", *_collectives(cost), "", *_sections(cost, adapters), "", *_top(cost, top), ""]
  if cost.unknown:
    lines += [f"kernels without a row in plan/kernels.py, counted by their bytes: {cost.unknown}"]
  return lines


def _training(plan: Plan, cost: cost_lib.Cost) -> list[str]:
  chips, peak = plan.topology.chips, plan.topology.chip.peak_flops
  rate, steps = plan.tokens / plan.seconds, plan.config.train.steps
  useful, compiled = plan.about["useful_flops"], cost.flops * chips
  days = plan.seconds * steps / 86400
  what = f"the recipe's {steps:,} steps"
  if epochs := plan.config.train.epochs:
    what = f"train.epochs={epochs:g}, of as many steps as the data give; {steps:,} steps"
  return [
    f"step {plan.seconds:.4f} s predicted; {_published(plan)}",
    f"  {rate:,.0f} tokens/s, {rate / chips:,.0f} per chip, if all places of the rows hold tokens",
    *(
      [
        f"  {rate * plan.row.filled:,.0f} tokens/s that count: {plan.row.filled:.1%} of the places are "
        "filled"
      ]
      if plan.row.filled < 1
      else []
    ),
    f"  MFU {plan.mfu:.3f} = useful FLOPs / (step seconds x {chips} chips x "
    f"{peak / 1e12:.0f} TFLOP/s)",
    f"  useful FLOPs {useful:.3e} (4N per token for frozen kernels, 6N for trainable ones, 2N in "
    "the frozen tower, causal attention, full rows)",
    f"  matmul FLOPs compiled {compiled:.3e}: useful share {useful / max(compiled, 1):.3f}",
    f"  {what}: {days:.2f} days, {days * 24 * chips:,.0f} chip hours",
  ]


def _published(plan: Plan) -> str:
  """Says what the published runs on a chip make of a predicted step."""
  chip = plan.topology.chip_name
  if plan.predictor != "fast":
    return "published runs were compared with quick plans"
  if plan.band is None:
    return f"no published run on {chip} to compare with"
  return f"{calibration.text(plan.band)} s by published runs on {chip}"


def _answering(plan: Plan, name: str, program: Program) -> list[str]:
  if name == LOOP:
    return [
      f"decode step {program.turn * 1e3:.3f} ms predicted, "
      f"{plan.rows / max(program.turn, 1e-12):,.0f} tokens/s"
    ]
  lines = [
    f"{program.seconds:.4f} s predicted, {program.runs} times to fill {plan.rows} rows: "
    f"{program.seconds * program.runs:.4f} s"
  ]
  if name == "admit" and not math.isnan(plan.seconds):
    rate = plan.tokens / plan.seconds
    lines += [f"prefill of all rows {plan.seconds:.4f} s predicted, {rate:,.0f} tokens/s"]
  return lines


def _how(plan: Plan) -> list[str]:
  chip = plan.topology.chip
  if plan.predictor == "none":
    return []
  slow = (
    f"between slices {chip.slow_rate / 1e9:.1f} GB/s a chip, " if plan.topology.slices > 1 else ""
  )
  return [
    f"how: {PREDICTORS[plan.predictor]} ({chip.peak_flops / 1e12:.0f} TFLOP/s), HBM "
    f"{chip.hbm_rate / 1e9:.0f} GB/s, link {chip.link_rate / 1e9:.0f} GB/s, {slow}vector unit "
    f"{chip.vector_rate / 1e12:.1f} Top/s; collectives run beside what the schedule puts between "
    "their start and done",
  ]


def _collectives(cost: cost_lib.Cost) -> list[str]:
  lines = [f"{'collective':<20}{'GB received':>12}{'times':>8}{'wire s':>9}{'waited s':>9}"]
  for kind, (size, count, wire, waited) in sorted(cost.collectives.items()):
    lines.append(f"{kind:<20}{size / 1e9:>12.3f}{count:>8.0f}{wire:>9.4f}{waited:>9.4f}")
  return lines


def _sections(cost: cost_lib.Cost, adapters: bool) -> list[str]:
  seconds = dict.fromkeys((name for name, _ in SECTIONS), 0.0)
  for entry in cost.entries:
    seconds[section(entry, adapters)] += entry.seconds
  total = max(cost.seconds, 1e-12)
  rows = [f"  {s:8.4f} s {s / total:6.1%}  {name}" for name, s in seconds.items() if s]
  return ["where the time goes:", *rows]


def section(entry: cost_lib.Entry, adapters: bool = True) -> str:
  """Returns the name of the section of the report, in SECTIONS, to which an operation belongs.

  `adapters` says whether the model has any; without them, `q_proj/dot_general` is a kernel's.
  """
  return next(
    name
    for name, pattern in SECTIONS
    if (adapters or name != ADAPTERS)
    and re.search(pattern, entry.kind if pattern.startswith("^") else entry.op_name or entry.name)
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
