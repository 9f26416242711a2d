"""Compiles a config for absent chips in a child process and reads what the compiler wrote.

In fast mode the child is stopped once buffers are assigned: the schedule is final by then, and the
rest, code generation, takes ten times as long. Only one compile runs at a time.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax.errors import LlavaSPError
from llava_sp_jax.plan import hlo, memory
from llava_sp_jax.plan.topologies import Topology
from llava_sp_jax.training import TRAIN_STEP

# What can be planned: the name of its compiled program, by which the compiler's files are found.
PROGRAMS = {"train": TRAIN_STEP, "eval": "answer_rows"}
# How the names of those files end.
SCHEDULE = ".after_optimizations_after_buffer_assignment.txt"
BUFFERS = ".after_optimizations-buffer-assignment.txt"
TOO_LARGE = ".oom_intermediate_module.txt"  # in place of the schedule
CODE = ".after_codegen.txt"
PATIENCE = 3600  # seconds

# platform: (modules of which one must be there, the extra of jax that brings the first)
NEEDS = {
  "tpu": (("libtpu",), "tpu"),
  "cuda": (("jax_cuda13_plugin", "jax_cuda12_plugin"), "cuda13"),
}
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # only keeps libtpu from asking for it
  "JAX_ENABLE_COMPILATION_CACHE": "false",  # what comes from a cache writes no schedule
}


class PlanError(LlavaSPError, ValueError):
  """A config that cannot be compiled for a topology, with the reason."""


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What is known of a compiled step; `module` is None where no schedule is written."""

  memory: memory.Memory
  seconds: float  # the compile took
  about: dict[str, Any]  # coordinates, mesh, useful_flops, parameters
  module: hlo.Module | None = None
  full: bool = False  # whether code was generated: the schedule has cycle counts


def check_installed(topology: Topology) -> None:
  """Raises: PlanError that says what to install."""
  modules, extra = NEEDS[topology.chip.platform]
  if all(importlib.util.find_spec(module) is None for module in modules):
    raise PlanError(
      f"--topology {topology.name}: its compiler is not installed (no module {modules[0]}); "
      f'pip install "jax[{extra}]=={importlib.metadata.version("jax")}"'
    )


def compile_config(
  config: config_lib.Config,
  topology: Topology,
  what: str,
  keep: Path | None = None,
  fast: bool = True,
) -> Compiled:
  """Compiles the real step. `keep` is a folder for the compiler's files.

  Raises: PlanError when it cannot be compiled for another reason than its memory.
  """
  check_installed(topology)
  with tempfile.TemporaryDirectory(prefix="llava-sp-plan-") as temporary:
    folder = keep or Path(temporary)
    folder.mkdir(parents=True, exist_ok=True)
    for old in _dumps(folder, what, ".txt"):
      old.unlink()
    for name in ("about.json", "done.json"):
      (folder / name).unlink(missing_ok=True)
    request = {
      "config": config_lib.to_dict(config),
      "what": what,
      "platform": topology.chip.platform,
      "topology": topology.compiler_name,
      "arguments": topology.compiler_arguments,
    }
    (folder / "request.json").write_text(json.dumps(request))
    started = time.monotonic()
    errors = _run(folder, what, fast)
    return _read(folder, what, errors, time.monotonic() - started, topology)


def _run(folder: Path, what: str, fast: bool) -> str:
  """Runs the child until it ends, or (fast) has written the schedule; returns what it printed."""
  flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
  environment = {**os.environ, **ENVIRONMENT, "XLA_FLAGS": flags}
  log = folder / "log.txt"
  with log.open("w") as output:
    child = subprocess.Popen(
      [sys.executable, "-m", "llava_sp_jax.plan.lower", str(folder / "request.json")],
      env=environment,
      stdout=output,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
    try:
      deadline = time.monotonic() + PATIENCE
      while child.poll() is None:
        if fast and all(_written(_dumps(folder, what, ending)) for ending in (SCHEDULE, BUFFERS)):
          break
        if time.monotonic() > deadline:
          raise PlanError(f"the compiler has not finished after {PATIENCE} s")
        time.sleep(0.5)
    finally:
      if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
  return log.read_text(errors="replace")


def _dumps(folder: Path, what: str, ending: str) -> list[Path]:
  """The compiler's files about a program."""
  return list(folder.glob(f"*jit_{PROGRAMS[what]}*{ending}"))


def _written(files: list[Path]) -> bool:
  """Whether a file is there and has not grown for a moment."""
  return (
    bool(files) and time.time() - files[0].stat().st_mtime > 1.0 and files[0].stat().st_size > 0
  )


def _read(folder: Path, what: str, printed: str, seconds: float, topology: Topology) -> Compiled:
  about_file, done_file = folder / "about.json", folder / "done.json"
  about = json.loads(about_file.read_text()) if about_file.is_file() else {}
  schedules = [f for ending in (CODE, SCHEDULE, TOO_LARGE) for f in _dumps(folder, what, ending)]
  if schedules and (buffers := _dumps(folder, what, BUFFERS)):
    module = hlo.parse(schedules[0].read_text())
    return Compiled(
      memory.of_assignment(buffers[0].read_text(), module),
      seconds,
      about,
      module,
      schedules[0].name.endswith(CODE),
    )
  if about and done_file.is_file():
    sizes = json.loads(done_file.read_text())
    return Compiled(memory.of_analysis(sizes), seconds, about)
  lines = [line for line in printed.splitlines() if line.strip()]
  reason = next((line for line in reversed(lines) if re.match(r"[\w.]*Error", line)), "")
  raise PlanError(
    f"the step cannot be compiled for {topology.name}: {reason or lines[-1] if lines else 'no output'}"
  )
