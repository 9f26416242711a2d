"""Measures the start of a training: the first one, one that resumes, and one with an executable.

Usage: python benchmarks/second_start.py [--layers 24] [--out docs/results/second_start]

Trains a small model with many unrolled layers for two steps, so that compiling takes long. Each start
is a process of its own, without torch, as where the package is installed. All starts run twice: with
XLA's own choice of fusions on a CPU, and with that of scripts/environment.sh. Then compiles the step of
a real recipe for a slice that is not there. Needs the extra `test`, and libtpu.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax

from llava_sp_jax import provenance
from llava_sp_jax.plan import topologies as slices
from llava_sp_jax.plan.compile import ENVIRONMENT
from llava_sp_jax.tools import plan as plan_tool
from llava_sp_jax.training import goodput
from tests import conftest
from tests.end_to_end import cluster

RECIPE, SLICE = "configs/finetune_lora.py:size=7b,init=", "v5e-16"
BEFORE = ("start", "compile", "restore", "input")  # categories of seconds until the first step
STEPS = 2
FLAGS = {"as installed": "", "without YNNPACK": "--xla_cpu_experimental_ynn_fusion_type="}  # of XLA
# What a process runs: torch, an extra of tests, is as if it were not installed.
PROGRAM = """
import sys
sys.modules["torch"] = None
from llava_sp_jax import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def recipe(folder: Path, layers: int) -> Path:
  conftest.write_data(folder / "data")
  config = conftest.config_maker(folder / "data")(
    "finetune",
    "cropping",
    model={
      "tower": {"layers": layers // 2, "select_layer": -2},
      "language_model": {"layers": layers},
      "scan_unroll": layers,
    },
    train={"steps": STEPS, "save_every": 1, "keep": STEPS, "sinks": ()},
  )
  return cluster.write_config(config, folder / "recipe.py")


def command(name: str, file: Path, flags: str, *options: str) -> float:
  """Runs a command of llava-sp with flags of XLA, and returns its CPU seconds."""
  kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  subprocess.run(
    [sys.executable, "-c", PROGRAM, name, f"--config={file}", *options],
    env=kept
    | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(file.parent / "cache"), "XLA_FLAGS": flags},
    stdout=subprocess.DEVNULL,
    check=True,
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def start(what: str, file: Path, flags: str, workdir: Path, *options: str) -> dict[str, Any]:
  """Starts a training that ends after step STEPS; its seconds by category, until the first step."""
  cpu = command("train", file, flags, f"--workdir={workdir}", *options)
  seconds = goodput.read(workdir)[-1].seconds
  found = {name: round(seconds[name], 2) for name in BEFORE}
  return {
    "name": what,
    **found,
    "to_first_step": round(sum(found.values()), 2),
    "cpu": round(cpu, 1),
  }


def back(workdir: Path) -> None:
  """Puts a run back to its first step, as if it had been killed in the second."""
  shutil.rmtree(workdir / "checkpoints" / str(STEPS))


def measure(folder: Path, layers: int, flags: str) -> list[dict[str, Any]]:
  """Runs all starts with flags of XLA."""
  folder.mkdir()
  file, run, step = recipe(folder, layers), folder / "run", folder / "step.bin"
  found = [start("first", file, flags, run)]
  for name in ("resumed", "resumed once more"):
    back(run)
    found.append(start(name, file, flags, run))
  command("plan", file, flags, "--topology=here", f"--write-executable={step}")
  back(run)
  given = f"--executable={step}"
  found.append(start("resumed with an executable", file, flags, run, given))
  shutil.rmtree(folder / "cache")
  found.append(start("first, with an executable", file, flags, folder / "two", given))
  return found


def absent() -> dict[str, float]:
  """Returns the seconds of tracing, and of compiling, the step of RECIPE for SLICE; no cache helps."""
  done = subprocess.run(
    [sys.executable, __file__, "--absent"],
    env={**os.environ, **ENVIRONMENT},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
  return result


def compile_absent() -> None:
  """Compiles in this process, and prints the seconds."""
  from jax.experimental import topologies

  from llava_sp_jax.distributed import mesh
  from llava_sp_jax.plan import lower

  _, config = plan_tool.read(["--config", RECIPE, "--topology", SLICE])
  chips = slices.topology(SLICE)
  devices = topologies.get_topology_desc(
    platform="tpu", topology_name=chips.compiler_name, **chips.compiler_arguments
  ).devices
  train = config.train
  device_mesh = mesh.create(config.mesh, train.batch_size, train.accumulate, list(devices))
  begun = time.monotonic()
  with jax.set_mesh(device_mesh):
    lowered = lower.train_step(config, device_mesh).lower()
    traced = time.monotonic()
    lowered.compile()
  print(json.dumps({"trace": traced - begun, "compile": time.monotonic() - traced}))


def table(rows: list[dict[str, Any]]) -> list[str]:
  """Returns the lines of a table of starts."""
  lines = [
    "",
    "| start | start | compile | restore | input | to the first step | share | CPU |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    share = row["to_first_step"] / rows[0]["to_first_step"]
    values = " | ".join(f"{row[name]:.1f}" for name in (*BEFORE, "to_first_step"))
    lines.append(f"| {row['name']} | {values} | {share:.1%} | {row['cpu']:.0f} |")
  return lines


def markdown(figures: dict[str, Any]) -> str:
  lines = [
    "# Time to the first step",
    "",
    f"Seconds from the start of the process to the first step, by category, of a decoder with "
    f"{figures['layers']} unrolled layers on a CPU; every start is a process of its own. `share` is the time "
    "to the first step as a share of the first start's. `CPU` has the CPU seconds of the whole process, "
    f"which trains one or {STEPS} steps and saves. The first start has an empty compilation cache; the one with an "
    "executable at the end likewise. The first resumption compiles what only a resumption needs. An executable is "
    "loaded while the run starts; `compile` has what is left of it then.",
    "",
    "Made by `python benchmarks/second_start.py --out docs/results/second_start`.",
  ]
  for name, rows in figures["starts"].items():
    lines += ["", f"## {name[0].upper()}{name[1:]}", "", f"`XLA_FLAGS={FLAGS[name]}`"]
    lines += table(rows)
  there = figures["absent"]
  lines += [
    "",
    "## For a slice",
    "",
    f"The step of `{RECIPE}` for {SLICE}, compiled by libtpu on the same machine: {there['trace']:.1f} s for tracing, "
    f"which every start without an executable needs, and {there['compile']:.1f} s for compiling, which the first needs.",
  ]
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--layers", type=int, default=24)
  parser.add_argument("--out", type=Path, default=None, help="writes OUT.md and OUT.json")
  parser.add_argument("--absent", action="store_true", help=argparse.SUPPRESS)
  options = parser.parse_args()
  if options.absent:
    return compile_absent()
  with tempfile.TemporaryDirectory(prefix="llava-sp-") as folder:
    figures: dict[str, Any] = {
      "layers": options.layers,
      "starts": {
        name: measure(Path(folder) / str(number), options.layers, flags)
        for number, (name, flags) in enumerate(FLAGS.items())
      },
    }
  figures["absent"] = absent()
  print(markdown(figures))
  if options.out:
    provenance.write(options.out, figures)
    provenance.named(options.out, "md").write_text(markdown(figures))


if __name__ == "__main__":
  main()
