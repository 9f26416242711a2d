"""llava-sp plan: predicts the memory and speed of a config on absent chips."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax import provenance
from llava_sp_jax.tools import arguments

OPTIONS = {
  "what": "train", "out": "", "keep": "", "top": "15", "full": "false", "search": "0", "write": "",
  "filled": "1", "samples": "1", "write-executable": "",
  **dict.fromkeys(arguments.FORMATS, ""),
}  # fmt: skip

FULL = {"true": True, "false": False}
# What is asked for -> options that have no effect then.
WITHOUT = {
  "--write-executable": (
    "what", "search", "write", "out", "keep", "full", "filled", "samples", *arguments.FORMATS
  ),
  "--what eval": ("search", "write", "filled", "samples"),
}  # fmt: skip

USAGE = """usage: llava-sp plan --config FILE[:OPTIONS] --topology NAME [--config.GROUP.KEY=VALUE]

Compiles the real train step (or the engine's programs) for TPUs that are absent, from shapes only,
and predicts memory and step time. Needs libtpu, which the extra tpu brings; for GPUs, of which it
predicts memory, jax-cuda12-plugin. A config that does not fit is refused (exit 1) with its largest
buffers.

  --config FILE[:OPTIONS]  a recipe, as for llava-sp train
  --topology NAME          the slice, as it is rented: {names};
                           NAMExN is N slices, such as v5e-256x2 (mesh.data: a multiple of N)
  --what train|eval        the train step, or the programs that answer prompts of data.row_length
                           positions in train.batch_size rows (default: train)
  --weights, --cache FORMAT  of an evaluation: how the model is held, as for llava-sp eval
  --filled SHARE           of the places of training rows that hold tokens, for tokens/s (default: 1)
  --samples N              equal samples in a training row, which attention skips among each other; a
                           step waits for the row with the longest sample (default: 1)
  --search N               try mesh, base placement, recomputation and micro-batches in at most N
                           compiles (10 to 60 seconds each for 7B); the fastest that fits wins (default: 0, none)
  --write FILE.py          the config that the search found, for llava-sp train --config FILE.py
                           (default: NAME-TOPOLOGY.py)
  --write-executable FILE  write the compiled train step, for llava-sp train --executable FILE on that
                           slice, and print no plan; --topology here compiles for this machine
  --out NAME               put the result into NAME.json and NAME.md, beside those that are there
  --keep DIR               keep the compiler's files (schedule, buffers) in DIR
  --top N                  how many of the longest operations are listed (default: 15)
  --full true              also generate code: exact cycle counts, five to ten times as long
  --config.GROUP.KEY=VALUE replaces one value; rows are --config.train.batch_size

example:
  llava-sp plan --config configs/finetune_lora.py:init= --topology v5e-16 \\
    --config.data.images_per_row=3 --config.train.batch_size=16
"""


def main(argv: list[str]) -> None:
  """Prints the plan of a config.

  Raises: PlanError when it does not fit or cannot be compiled.
  """
  from llava_sp_jax.plan import topologies

  if {"--help", "-h"} & set(argv):
    print(USAGE.format(names=", ".join(topologies.SLICES)))
    return
  options, config = read(argv)
  if options["write-executable"]:
    from llava_sp_jax.plan import executable

    print(executable.write(config, options["topology"], Path(options["write-executable"])))
    return
  topology = topologies.topology(options["topology"])
  budget = int(options["search"])
  if budget and not topology.chip.speed:
    raise config_lib.ConfigError(
      f"--search: chooses the fastest step, and no speed is predicted for {topology.name}; leave it out"
    )

  from llava_sp_jax.plan import compile as compile_lib
  from llava_sp_jax.plan import explain, kernels, records, report

  keep = Path(options["keep"]) if options["keep"] else None
  out = Path(options["out"]) if options["out"] else None
  if out:
    records.check(out)

  def make(config: config_lib.Config) -> report.Plan:
    fast = not FULL[options["full"].lower()]
    compiled = compile_lib.compile_config(config, topology, options["what"], keep, fast)
    row = kernels.Row(int(options["samples"]), float(options["filled"]))
    return report.make(config, topology, options["what"], compiled, row)

  plan = _search(config, topology, budget, make, options, argv) if budget else make(config)
  if out:
    kept = records.append(out, plan.record())
    provenance.named(out, "md").write_text(records.table(kept))
  if not plan.fits:
    raise explain.refusal(plan)
  print(explain.text(plan, int(options["top"])))


def _search(
  config: config_lib.Config,
  topology: Any,
  budget: int,
  make: Callable[[config_lib.Config], Any],
  options: dict[str, str],
  argv: list[str],
) -> Any:
  """Returns the fastest plan of a search and writes its recipe.

  Returns the plan of least memory if none fits. Raises: PlanError if none can be compiled.
  """
  from llava_sp_jax.plan import compile as compile_lib
  from llava_sp_jax.plan import hlo, search

  plans: dict[config_lib.Config, Any] = {}

  def evaluate(candidate: config_lib.Config) -> search.Outcome:
    try:
      plan = plans[candidate] = make(candidate)
    except (compile_lib.PlanError, hlo.HloError) as error:
      print(f"{len(plans):>3}  {error}", flush=True)
      return search.Outcome(False, math.nan, 0)
    speed = f"{plan.seconds:.4f} s" if plan.fits else "does not fit"
    mesh = candidate.mesh
    print(
      f"{len(plans):>3}  accumulate {candidate.train.accumulate}, remat {candidate.model.remat}, "
      f"base {mesh.base}, mesh {mesh.data} x {mesh.fsdp} x {mesh.tensor}: {speed}, "
      f"{plan.used / (1 << 30):.2f} GiB",
      flush=True,
    )
    return search.Outcome(plan.fits, plan.seconds, plan.used)

  tried = search.search(config, topology.devices, budget, evaluate, topology.slices)
  best = search.best(tried)
  if best is None:
    if not plans:
      raise compile_lib.PlanError("none of the candidates can be compiled")
    return min(plans.values(), key=lambda plan: plan.used)
  file = Path(options["write"] or f"{config.name}-{topology.name}.py")
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(search.recipe(best.config, f"Found by: llava-sp plan {' '.join(argv)}"))
  print(f"the fastest of {len(tried)} is written to {file}\n")
  return plans[best.config]


def read(argv: list[str]) -> tuple[dict[str, str], config_lib.Config]:
  """Parses the options of the command, and the config with its overrides.

  Raises: ConfigError for wrong options or values.
  """
  config, options = arguments.RecipeParser("plan", ("topology",), OPTIONS).read(argv, _check)
  weights, cache = (options[name] for name in arguments.FORMATS)
  if weights or cache:
    from llava_sp_jax.models import build

    model = build.answering(config.model, weights, cache)
    config = dataclasses.replace(config, model=model)
  return options, config


def _chosen(options: dict[str, str], action: str) -> bool:
  """Returns whether the options have `action`, a key of WITHOUT."""
  name, _, value = action.removeprefix("--").partition(" ")
  return options[name] == value if value else options[name] != OPTIONS[name]


def _check(options: dict[str, str]) -> None:
  from llava_sp_jax.plan import compile as compile_lib

  config_lib.lookup("--what", options["what"], compile_lib.PROGRAMS)
  given = [f"--{name}" for name in arguments.FORMATS if options[name]]
  if given and options["what"] != "eval":
    raise config_lib.ConfigError(
      f"{', '.join(given)}: of an evaluation; add --what eval. The base of a train step is "
      "--config.model.quantize"
    )
  for action, others in WITHOUT.items():
    useless = [name for name in others if options[name] != OPTIONS[name]]
    if _chosen(options, action) and useless:
      raise config_lib.ConfigError(
        f"--{', --'.join(useless)}: without effect with {action}; leave {'it' if len(useless) == 1 else 'them'} out"
      )
  if options["write"] and options["search"] == OPTIONS["search"]:
    raise config_lib.ConfigError("--write: the config that a search found; add --search N")
  config_lib.lookup("--full", options["full"].lower(), FULL)
  for name, least in (("top", 1), ("search", 0), ("samples", 1)):
    arguments.whole(name, options[name], least)
  if not re.fullmatch(r"1(\.0*)?|0?\.\d*[1-9]\d*", options["filled"]):
    raise config_lib.ConfigError(
      f"--filled: expected a share above 0 and up to 1, such as .97, found {options['filled']!r:.40}"
    )
