"""Compiles a config for absent chips in a child process, and reads the compiler's dumps.

Fast mode stops the child once buffers are assigned: the schedule is final then, and the remaining
code generation takes ten times as long. Only one compilation runs at a time.
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_sp_jax import children
from llava_sp_jax import config as config_lib
from llava_sp_jax.errors import LlavaSPError
from llava_sp_jax.plan import hlo, memory
from llava_sp_jax.plan.topologies import Topology
from llava_sp_jax.training import TRAIN_STEP

TRAIN, EVAL = "train", "eval"  # values of --what
# Program -> its name in the names of the compiler's dumps, for each value of --what. An evaluation
# has those of the engine (`infer.programs`): the tower, prefill of what prompts share, prefill of
# the rest into rows, and a decode step.
PROGRAMS = {
  TRAIN: {TRAIN: TRAIN_STEP},
  EVAL: {name: f"infer_{name}" for name in ("encode", "grow", "admit", "decode")},
}
# Endings of the names of the dumps.
SCHEDULE = ".after_optimizations_after_buffer_assignment.txt"
BUFFERS = ".after_optimizations-buffer-assignment.txt"
TOO_LARGE = ".oom_intermediate_module.txt"  # in place of the schedule, if the program does not fit
CODE = ".after_codegen.txt"
PATIENCE = 3600  # the most seconds of a compilation

# platform -> (modules, of which one is needed; what installs one of them, before its version). For a
# GPU that is absent, jax's plugin is enough: the compiler is in it, and CUDA's libraries are not
# needed.
NEEDS = {
  "tpu": (("libtpu",), "jax[tpu]"),
  "cuda": (("jax_cuda13_plugin", "jax_cuda12_plugin"), "jax-cuda12-plugin"),
}
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "TPU_SKIP_MDS_QUERY": "1",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any value keeps libtpu from querying for it
  "JAX_ENABLE_COMPILATION_CACHE": "false",  # a cached program writes no dumps
}


FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")  # variables with options of the compiler
# Beginnings of options that say nothing of a plan; the last one jax adds to LIBTPU_INIT_ARGS itself.
ELSEWHERE = (
  "--xla_cpu", "--xla_force_host_platform", "--xla_dump", "--xla_tpu_use_enhanced_launch_barrier",
)  # fmt: skip


class PlanError(LlavaSPError, ValueError):
  """Reports a config that cannot be compiled for a topology, with the reason."""


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Holds what is known of a compiled program."""

  memory: memory.Memory
  seconds: float  # of the compilation
  about: dict[str, Any]  # coordinates, mesh, rows, parameters; what `plan.lower` says of it
  module: hlo.Module | None = None  # the schedule; None if the compiler wrote none
  full: bool = False  # whether code was generated, so that the schedule has cycle counts


def check_installed(topology: Topology) -> None:
  """Checks that a topology's compiler is installed. Raises: PlanError that says what to install."""
  modules, package = NEEDS[topology.chip.platform]
  if all(importlib.util.find_spec(module) is None for module in modules):
    raise PlanError(
      f"--topology {topology.name}: its compiler is not installed (no module "
      f'{" or ".join(modules)}); pip install "{package}=={importlib.metadata.version("jax")}"'
    )


def compiler(topology: Topology) -> str:
  """Returns the name and version of a topology's compiler, such as "libtpu 0.0.42"; "" for none."""
  modules, _ = NEEDS[topology.chip.platform]
  for module in modules:
    if importlib.util.find_spec(module) is not None:
      return f"{module} {importlib.metadata.version(module.replace('_', '-'))}"
  return ""


def options(topology: Topology, environment: Mapping[str, str] = os.environ) -> str:
  """Returns the options of the compiler that the user has chosen in `environment`, as they stand.

  Leaves out those that concern other compilers, and what jax adds on a machine with TPUs.
  """
  names = FLAGS if topology.chip.platform == "tpu" else ("XLA_FLAGS",)
  chosen = [flag for name in names for flag in environment.get(name, "").split()]
  return " ".join(flag for flag in chosen if not flag.startswith(ELSEWHERE))


def compile_config(
  config: config_lib.Config,
  topology: Topology,
  what: str,
  keep: Path | None = None,
  fast: bool = True,
) -> dict[str, Compiled]:
  """Compiles the real train step, or the engine's programs, each in a child process.

  Args:
    config: the config to compile.
    topology: the chips to compile for.
    what: "train" or "eval", a key of PROGRAMS.
    keep: a folder that keeps the compiler's dumps (None: they are deleted).
    fast: stops before code generation.

  Returns: what is known of each program, by its name in PROGRAMS.
  Raises: PlanError when a program cannot be compiled; one that exceeds the memory of a device does
    not raise.
  """
  check_installed(topology)
  with tempfile.TemporaryDirectory(prefix="llava-sp-plan-") as temporary:
    folder = keep or Path(temporary)
    return {
      program: _compile(config, topology, program, dumped, folder, fast)
      for program, dumped in PROGRAMS[what].items()
    }


def compile_key(
  config: config_lib.Config, topology: Topology, key: tuple[str | int, ...]
) -> Compiled:
  """Compiles one of the engine's programs for the sizes in its key (`answers.ENTRIES`).

  Raises: PlanError when it cannot be compiled.
  """
  check_installed(topology)
  name = str(key[0])
  with tempfile.TemporaryDirectory(prefix="llava-sp-plan-") as folder:
    return _compile(config, topology, name, PROGRAMS[EVAL][name], Path(folder), True, key)


def _compile(
  config: config_lib.Config,
  topology: Topology,
  program: str,
  dumped: str,
  folder: Path,
  fast: bool,
  key: tuple[str | int, ...] = (),
) -> Compiled:
  """Compiles one program; `dumped` is its name in the names of dumps, which go to `folder`.

  `key` has the sizes of one of the engine's programs (none: those that `answers.admitted` finds).
  """
  folder.mkdir(parents=True, exist_ok=True)
  for old in _dumps(folder, dumped, ".txt"):
    old.unlink()
  for name in ("about.json", "done.json"):
    (folder / name).unlink(missing_ok=True)
  request = {
    "config": config_lib.to_dict(config),
    "program": program,
    "key": list(key),
    "platform": topology.chip.platform,
    "topology": topology.compiler_name,
    "arguments": topology.compiler_arguments,
    "limit": topology.chip.limit,
    "options": options(topology),
  }
  (folder / "request.json").write_text(json.dumps(request))
  started = time.monotonic()
  errors = _run(folder, dumped, fast)
  seconds = time.monotonic() - started
  done = (folder / "done.json").is_file() or _dumps(folder, dumped, TOO_LARGE)
  if not fast and not done and _dumps(folder, dumped, SCHEDULE):
    raise PlanError(
      f"{program}: no code was generated for {topology.name}: {_reason(errors)}; --full false plans "
      "without"
    )
  return _read(folder, program, dumped, errors, seconds, topology)


def held(about: dict[str, Any]) -> int:
  """Returns the bytes on a device that a program does not make: its arguments, and all beside them.

  `about` is what `plan.lower` says of the program.
  """
  return sum(sum(about.get(key, {}).values()) for key in ("arguments", "beside"))


def _run(folder: Path, dumped: str, fast: bool) -> str:
  """Runs the child until it exits, or (`fast`) has written the schedule; returns its output.

  Raises: PlanError after PATIENCE seconds.
  """
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder} --xla_dump_hlo_as_text"
  environment = children.environment({**os.environ, **ENVIRONMENT, "XLA_FLAGS": flags})
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
        if fast and all(_written(_dumps(folder, dumped, ending)) for ending in (SCHEDULE, BUFFERS)):
          break
        if time.monotonic() > deadline:
          raise PlanError(f"the compiler has not finished after {PATIENCE} s")
        time.sleep(0.5)
    finally:
      if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
  return log.read_text(errors="replace")


def _dumps(folder: Path, dumped: str, ending: str) -> list[Path]:
  """Returns the compiler's dumps of a program whose names have an ending."""
  return list(folder.glob(f"*jit_{dumped}*{ending}"))


def _written(files: list[Path]) -> bool:
  """Returns whether the first file exists, is not empty, and was last written over a second ago."""
  return (
    bool(files) and time.time() - files[0].stat().st_mtime > 1.0 and files[0].stat().st_size > 0
  )


def _read(
  folder: Path, program: str, dumped: str, printed: str, seconds: float, topology: Topology
) -> Compiled:
  about_file, done_file = folder / "about.json", folder / "done.json"
  about = json.loads(about_file.read_text()) if about_file.is_file() else {}
  schedules = [f for ending in (CODE, SCHEDULE, TOO_LARGE) for f in _dumps(folder, dumped, ending)]
  if schedules and (buffers := _dumps(folder, dumped, BUFFERS)):
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
  if held(about) > topology.chip.limit:
    return Compiled(memory.of_arguments(about["arguments"]), seconds, about)
  raise PlanError(f"{program} cannot be compiled for {topology.name}: {_reason(printed)}")


def _reason(printed: str) -> str:
  """Returns the line of a child's output that says why it failed."""
  lines = [line for line in printed.splitlines() if line.strip()] or ["no output"]
  return next((line for line in reversed(lines) if re.match(r"[\w.]*Error", line)), lines[-1])
