"""Compiles the train step for a slice and writes it to a file, which `llava-sp train` loads.

A child process compiles, with the environment that jax reads at import: `python -m
llava_sp_jax.plan.executable REQUEST.json`. `--topology here` is the devices of this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llava_sp_jax import children
from llava_sp_jax import config as config_lib
from llava_sp_jax.plan.compile import ENVIRONMENT, PlanError, check_installed
from llava_sp_jax.plan.topologies import topology

HERE = "here"  # value of --topology
# On CPUs, a program that was read from the cache cannot be written again.
UNCACHED = {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def write(config: config_lib.Config, name: str, path: Path) -> str:
  """Writes the compiled step of a config to `path`, and returns a line that says so.

  Args:
    config: the config of the run.
    name: the slice, as `--topology` names it.
    path: the file; what it was compiled for is written to `path`.json.

  With `train.epochs`, the data must be here, because their number of rows gives the steps.

  Raises: PlanError when it cannot be compiled, or the chips are not those of a TPU.
  """
  request: dict[str, Any] = {"config": config_lib.to_dict(config), "path": str(path.absolute())}
  environment = {**os.environ, **UNCACHED}
  if name != HERE:
    chips = topology(name)
    if chips.chip.platform != "tpu":
      raise PlanError(
        f"--write-executable: compiles for TPUs that are absent, not for {name}; on a machine that "
        f"has the devices, give --topology {HERE}"
      )
    check_installed(chips)
    request |= {"topology": chips.compiler_name, "arguments": chips.compiler_arguments}
    environment |= ENVIRONMENT
  environment = children.environment(environment)
  begun = time.monotonic()
  with tempfile.TemporaryDirectory(prefix="llava-sp-plan-") as folder:
    file = Path(folder) / "request.json"
    file.write_text(json.dumps(request))
    done = subprocess.run(
      [sys.executable, "-m", "llava_sp_jax.plan.executable", str(file)],
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
      check=False,
    )
  if done.returncode:
    lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
    raise PlanError(f"--write-executable: the step cannot be compiled for {name}: {lines[-1]:.300}")
  steps = json.loads(path.with_name(f"{path.name}.json").read_text())["config"]["train"]["steps"]
  return (
    f"{path}: the train step for {name} and a run of {steps:,} steps, {path.stat().st_size / 1e6:,.1f} MB, compiled in "
    f"{time.monotonic() - begun:.0f} s; llava-sp train --executable {path} starts with it"
  )


def main(file: str) -> None:
  """Compiles the request in a JSON file, for its topology or for the devices that are here."""
  import jax
  from jax.experimental import topologies

  from llava_sp_jax.distributed import mesh
  from llava_sp_jax.plan import lower
  from llava_sp_jax.training import executables, inputs, resume

  request = json.loads(Path(file).read_text())
  config = config_lib.from_dict(request["config"])
  if config.train.epochs:  # the learning rate of a step depends on the number of steps
    config = resume.with_steps_for(config, inputs.first_rows(config))
  devices = jax.devices()
  if "topology" in request:
    described = topologies.get_topology_desc(
      platform="tpu", topology_name=request["topology"], **request["arguments"]
    )
    devices = list(described.devices)
  train = config.train
  device_mesh = mesh.create(config.mesh, train.batch_size, train.accumulate, devices)
  with jax.set_mesh(device_mesh):
    compiled = lower.train_step(config, device_mesh).lower().compile()
  batch = lower.batch(config, device_mesh)
  executables.write(Path(request["path"]), compiled, batch, config, device_mesh)


if __name__ == "__main__":
  children.end_with_parent()
  main(sys.argv[1])
