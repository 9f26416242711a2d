"""Runs `llava-sp train` as real processes on this machine, joined over gloo, and reads what they left."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax import storage
from llava_sp_jax.checkpoints import on_disk
from llava_sp_jax.training import ledger, loop
from tests.conftest import DEVICES_FLAG, REPOSITORY

PATIENCE = 600  # seconds until a process that should be doing something is given up
GRACE = 30  # seconds from SIGTERM to SIGKILL: what spot TPU VMs and SLURM (KillWait) give


def write_config(config: config_lib.Config, path: Path) -> Path:
  """A config file as users write them."""
  path.write_text(
    '"""A tiny run."""\n\nfrom ml_collections import ConfigDict\n\n\ndef get_config(arg=""):\n'
    f"  return ConfigDict({config_lib.to_dict(config)!r})\n"
  )
  return path


@dataclasses.dataclass(frozen=True)
class Topology:
  """How many processes, the devices of each, and the mesh over all (data, fsdp, tensor)."""

  processes: int = 1
  devices: int = 1
  mesh: tuple[int, int, int] = (1, -1, 1)

  def __str__(self) -> str:
    return f"{self.processes}x{self.devices} {'.'.join(map(str, self.mesh))}"

  def flags(self) -> list[str]:
    axes = zip(("data", "fsdp", "tensor"), self.mesh, strict=True)
    return [f"--config.mesh.{name}={size}" for name, size in axes]


class Cluster:
  """The processes of one run; what they print goes to `<workdir>.<process>.log`."""

  def __init__(
    self,
    config_file: Path,
    workdir: Path,
    topology: Topology = Topology(),
    *more: str,
    last: Sequence[str] = (),
    logs: Path | None = None,
  ):
    """All get the options `more`, the last process also `last`; `logs` replaces <workdir>."""
    self.workdir, self.topology = workdir, topology
    flags = os.environ.get("XLA_FLAGS", "").replace(DEVICES_FLAG, "").strip()
    flags += f" --xla_force_host_platform_device_count={topology.devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    command = [
      sys.executable,
      "-m",
      "llava_sp_jax.cli",
      "train",
      f"--config={config_file}",
      f"--workdir={workdir}",
      *topology.flags(),
      *more,
    ]
    with socket.socket() as free:
      free.bind(("localhost", 0))
      address = f"localhost:{free.getsockname()[1]}"
    logs = logs or workdir
    self.logs = [logs.with_name(f"{logs.name}.{i}.log") for i in range(topology.processes)]
    self.processes = []
    for i, log in enumerate(self.logs):
      joined = ["--coordinator", address, f"--processes={topology.processes}", f"--process={i}"]
      joined += last if i == topology.processes - 1 else []
      with log.open("w") as out:
        self.processes.append(
          subprocess.Popen(
            command + joined * (topology.processes > 1),
            cwd=REPOSITORY,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
          )
        )

  def printed(self, process: int = 0) -> str:
    return self.logs[process].read_text()

  def wait_for(self, condition: Callable[[], Any], pause: float = 0.02) -> bool:
    """Polls until `condition()`; False when a process ended before."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
      if condition():
        return True
      if any(process.poll() is not None for process in self.processes):
        return False
      time.sleep(pause)
    self.kill()
    raise AssertionError(f"nothing happened for {PATIENCE} s:\n{self.printed()}")

  def send(self, number: signal.Signals, process: int) -> None:
    self.processes[process].send_signal(number)

  def kill(self) -> None:
    """SIGKILL to every process, as when a job is cancelled."""
    for process in self.processes:
      process.kill()
    for process in self.processes:
      process.wait()

  def wait(self, patience: float = PATIENCE) -> list[int]:
    """Exit codes; whoever has not ended by then is killed, and an AssertionError raised."""
    until = time.monotonic() + patience
    try:
      return [p.wait(max(until - time.monotonic(), 0.1)) for p in self.processes]
    except subprocess.TimeoutExpired:
      self.kill()
      raise AssertionError(f"still running after {patience} s:\n{self.printed()}") from None

  def finish(self, code: int = 0) -> str:
    """Waits until all end with `code`; what process 0 printed."""
    codes = self.wait()
    assert set(codes) == {code}, "\n".join(map(self.printed, range(len(codes))))
    return self.printed()


def metrics(workdir: Path) -> list[dict[str, Any]]:
  """Whole lines of the log."""
  text = storage.of(workdir).content(workdir / loop.METRICS_FILE).decode()
  return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_step(workdir: Path) -> int:
  """The last step that is logged, 0 before the first."""
  lines = metrics(workdir)
  return lines[-1]["step"] if lines else 0


def losses(workdir: Path) -> list[float]:
  lines = metrics(workdir)
  assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
  return [line["loss"] for line in lines]


def samples(workdir: Path) -> list[list[int]]:
  """The samples that each step has trained, in the order of its rows (each process has a block)."""
  lines = [line for line in ledger.read(workdir) if "rows" in line]
  lines.sort(key=lambda line: (line["step"], line["rows"][0]))
  steps = itertools.groupby(lines, key=lambda line: line["step"])
  return [[i for line in group for i in line["trained"]] for _, group in steps]


def saved(workdir: Path) -> list[int]:
  """Steps of the whole checkpoints."""
  found = {*(workdir / "checkpoints").glob("*")} - {*on_disk.unfinished(workdir)}
  return sorted(int(p.name) for p in found if re.fullmatch(r"\d+", p.name))
