"""Makes plans of compiled programs. `records` keeps them; `explain` has the report that people read."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax.hardware import GIB
from llava_sp_jax.plan import calibration
from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import cost as cost_lib
from llava_sp_jax.plan.compile import TRAIN, Compiled
from llava_sp_jax.plan.kernels import FULL, Row
from llava_sp_jax.plan.memory import TEMPORARIES
from llava_sp_jax.plan.topologies import Topology

# The program, scratch of collectives and the runtime's memory are not in the buffer assignment.
RESERVE = int(0.35 * GIB)
RESERVED = "program and runtime (reserved)"
UNREAD = "parameters that it does not read"
PREDICTORS = {
  "fast": "schedule walk, FLOPs at 93% of peak",
  "full": "schedule walk, the compiler's cycles for matmuls",
  "none": "memory only",
}
FLOATS = {
  "weights": "none",
  "cache": "float",
  "quantize": "none",
  "products": "float",
}  # formats that a record does not name
LOOP = "decode"  # the program of which a record has one iteration


@dataclasses.dataclass(frozen=True)
class Program:
  """Holds the prediction for one program."""

  compiled: Compiled
  cost: cost_lib.Cost | None  # None: only memory is predicted

  @property
  def parts(self) -> dict[str, int]:
    """Returns the bytes in the memory of a device while it runs, by part."""
    about, found = self.compiled.about, dict(self.compiled.memory.parts)
    read = sum(size for part, size in found.items() if part != TEMPORARIES)
    unread = sum(about.get("arguments", {}).values()) - read
    more = {UNREAD: max(unread, 0), **about.get("beside", {})}
    if self.compiled.module:
      more[RESERVED] = RESERVE
    return found | {part: size for part, size in more.items() if size}

  @property
  def used(self) -> int:
    """Returns the bytes that the program, all beside it and the runtime need on a device."""
    return sum(self.parts.values())

  @property
  def runs(self) -> int:
    """Returns how often it runs: in a step, or to fill all rows with prompts."""
    return int(self.compiled.about.get("runs", 1))

  @property
  def seconds(self) -> float:
    """Returns the seconds of one execution, without loops of unknown length; nan if unknown."""
    return self.cost.seconds if self.cost else math.nan

  @property
  def turn(self) -> float:
    """Returns the seconds of one iteration of its loop of unknown length; nan without one."""
    loops = self.cost.loops.values() if self.cost else ()
    return max((loop.seconds for loop in loops), default=math.nan)


@dataclasses.dataclass(frozen=True)
class Plan:
  """Holds the prediction for one config on one topology.

  `row` is what is assumed of rows: the share of places that hold tokens, the others being padding,
  and the samples.
  """

  config: config_lib.Config
  topology: Topology
  what: str  # "train" or "eval", a key of `compile.PROGRAMS`
  programs: dict[str, Program]
  row: Row = FULL

  @property
  def largest(self) -> Program:
    """Returns the program that needs most memory."""
    return max(self.programs.values(), key=lambda program: program.used)

  @property
  def about(self) -> dict[str, Any]:
    """Returns what is known of any of the programs: mesh, rows, parameters."""
    return next(iter(self.programs.values())).compiled.about

  @property
  def limit(self) -> int:
    """Returns the memory of a device that a program may use, in bytes."""
    return self.topology.chip.limit

  @property
  def used(self) -> int:
    """Returns the memory that programs and runtime need at most on a device, in bytes."""
    return self.largest.used

  @property
  def fits(self) -> bool:
    """Returns whether all programs fit into the memory of a device."""
    return self.used <= self.limit

  @property
  def rows(self) -> int:
    """Returns the rows of a step; of an evaluation those that are answered together."""
    return int(self.about.get("rows", self.config.train.batch_size))

  @property
  def seconds(self) -> float:
    """Returns the seconds of a train step, or of filling all rows of an evaluation with prompts.

    Returns nan if they are not predicted.
    """
    return sum(p.seconds * p.runs for name, p in self.programs.items() if name != LOOP)

  @property
  def mfu(self) -> float:
    """Returns the model FLOPs utilization of a train step, a share; nan if no time is predicted."""
    peak = self.topology.chips * self.topology.chip.peak_flops
    result: float = self.about.get("useful_flops", 0.0) / (peak * self.seconds)
    return result

  @property
  def band(self) -> tuple[float, float] | None:
    """Returns the seconds of a train step by published runs, with which quick plans were compared.

    Returns None without such runs, or if the plan is no quick one.
    """
    return calibration.band(self.topology, self.seconds) if self.predictor == "fast" else None

  @property
  def predictor(self) -> str:
    """Returns how the time is predicted: "fast", "full" or "none", a key of PREDICTORS."""
    if any(program.cost is None for program in self.programs.values()):
      return "none"
    return "full" if self.largest.compiled.full else "fast"

  @property
  def tokens(self) -> int:
    """Returns the number of places of a step: rows times row length."""
    return self.rows * self.config.data.row_length

  @property
  def filled(self) -> float:
    """Returns the share of the places of rows that hold tokens; 1 of an evaluation."""
    return self.row.filled if self.what == TRAIN else 1.0

  def record(self) -> dict[str, Any]:
    """Returns the plan as a row for the JSON file; its times are None unless the plan fits."""
    config, about = self.config, self.about
    speed = self.fits and not math.isnan(self.seconds)
    result = {
      "model": config.name,
      "topology": self.topology.name,
      "what": self.what,
      "rows": self.rows,
      "row_length": config.data.row_length,
      "images_per_row": config.data.images_per_row,
      "settings": settings(config),
      "step_seconds": round(self.seconds, 4) if speed else None,
      "tokens_per_second": round(self.tokens * self.filled / self.seconds) if speed else None,
      "hbm_gib": round(self.used / GIB, 2),
      "hbm_limit_gib": round(self.limit / GIB, 2),
      "fits": self.fits,
      "predictor": PREDICTORS[self.predictor if speed else "none"],
      "compiler": compile_lib.compiler(self.topology),
      "mesh": about.get("mesh"),
      **({"options": about["options"]} if about.get("options") else {}),
    }
    return result | (self._training(speed) if self.what == TRAIN else self._answering(speed))

  def _training(self, speed: bool) -> dict[str, Any]:
    config = self.config
    band = self.band if speed else None
    result = {
      "step_seconds_published": [round(seconds, 4) for seconds in band] if band else None,
      "mfu": round(self.mfu, 4) if speed else None,
      "filled": self.row.filled,
      "accumulate": config.train.accumulate,
      "remat": config.model.remat,
      "base": config.mesh.base,
    }
    held = {"quantize": config.model.quantize, "products": config.model.frozen_matmul}
    counts = {"samples": self.row.samples, "unrolled": config.model.scan_unroll}
    several = {key: count for key, count in counts.items() if count > 1}
    return result | several | {key: form for key, form in held.items() if form != FLOATS[key]}

  def _answering(self, speed: bool) -> dict[str, Any]:
    from llava_sp_jax.plan import traffic

    model, found = self.config.model, traffic.of(self.config.model)
    held = {"weights": model.quantize, "cache": model.cache}
    return {
      **{key: form for key, form in held.items() if form != FLOATS[key]},
      "decode_step_seconds": round(self.programs[LOOP].turn, 6) if speed else None,
      "decode_bytes": found.step(self.rows, self.config.data.row_length),
      "programs": {
        name: {
          "runs": program.runs,
          "seconds": round(program.seconds, 6) if speed and name != LOOP else None,
          "hbm_gib": round(program.used / GIB, 2),
        }
        for name, program in self.programs.items()
      },
    }


def make(
  config: config_lib.Config,
  topology: Topology,
  what: str,
  compiled: dict[str, Compiled],
  row: Row = FULL,
) -> Plan:
  """Makes the plan of compiled programs; predicts times if schedule and rates are known.

  `what` is "train" or "eval". `row` is what is assumed of rows.
  """
  programs = {name: Program(found, _cost(found, topology, row)) for name, found in compiled.items()}
  return Plan(config, topology, what, programs, row)


def settings(config: config_lib.Config) -> str:
  """Returns a short hash of what a program is compiled from beside the other keys of its record.

  That is the model, the optimizer, and the kind of rows.
  """
  data, adam = config.data, config.optimizer
  values = [
    dataclasses.asdict(dataclasses.replace(config.model, remat="none", scan_unroll=1)),
    [adam.stage, adam.moment_dtype, config.train.loss_chunk],
    [data.packing, data.samples_per_row, data.turns],
  ]
  return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:6]


def _cost(compiled: Compiled, topology: Topology, row: Row) -> cost_lib.Cost | None:
  if not compiled.module or not topology.chip.speed:
    return None
  return cost_lib.Predictor(compiled.module, topology, compiled.about["coordinates"], row).run()
