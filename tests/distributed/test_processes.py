"""Start-up by flags and environments."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from typing import Any

import jax
import pytest

from llava_sp_jax import cli, recipes
from llava_sp_jax.config import Config, ConfigError
from llava_sp_jax.distributed import processes
from llava_sp_jax.tools import train as train_tool
from tests.conftest import REPOSITORY

FLAGS = {"coordinator": "host:1234", "processes": "4", "process": "3"}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
  """Calls of jax.distributed.initialize, which is not carried out; the environment is bare."""
  calls: list[tuple] = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
  monkeypatch.setattr(processes.os, "environ", {})
  return calls


def test_flags_describe_a_process(asked: list[tuple], monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(processes, "_reach", lambda coordinator: None)
  processes.start(FLAGS, 30)
  ((_, given),) = asked
  names = ("coordinator_address", "num_processes", "process_id", "heartbeat_timeout_seconds")
  assert [given[name] for name in names] == ["host:1234", 4, 3, 30]


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_port_in_use_is_an_error(asked: list[tuple], family: socket.AddressFamily) -> None:
  """JAX's service would end the process with a segmentation fault."""
  with socket.socket(family) as taken:
    taken.bind(("", 0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"port {port} of localhost cannot be used .*in use"):
      processes.start({**FLAGS, "coordinator": f"localhost:{port}", "process": "0"})
  assert not asked
  processes.start({**FLAGS, "coordinator": f"localhost:{port}", "process": "0"})
  assert asked


def test_a_coordinator_that_does_not_answer_is_waited_for(
  asked: list[tuple], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  with socket.socket() as late:
    late.bind(("localhost", 0))
    address = f"localhost:{late.getsockname()[1]}"
    monkeypatch.setattr(processes, "START_SECONDS", 0.6)
    with pytest.raises(processes.PeerError, match=rf"{address}: no answer for \d s .*is process 0"):
      processes.start({**FLAGS, "coordinator": address})
    assert f"waiting for process 0 at {address} (" in capsys.readouterr().out
    assert not asked
    monkeypatch.setattr(processes, "START_SECONDS", 30)
    threading.Timer(0.2, late.listen).start()
    processes.start({**FLAGS, "coordinator": address})
  assert asked


def test_who_is_alone_says_so_within_the_limit(capfd: pytest.CaptureFixture) -> None:
  """One of two is started; JAX's own end is a fault with a stack of C++."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  code = (
    "import sys; from llava_sp_jax.distributed import processes; processes.START_SECONDS = 3\n"
    "processes.start({'coordinator': sys.argv[1], 'processes': '2', 'process': '0'})"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, address],
    cwd=REPOSITORY,
    timeout=60,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert done.stderr == (
    "llava-sp: the processes of this run did not find each other within 3 s; are all of them "
    "started, with the same --coordinator and --processes?\n"
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"coordinator": None}, "^no --coordinator; several processes are started with --coordinator"),
    ({"processes": None, "process": None}, "^no --processes; no --process; several"),
    ({"coordinator": "host"}, "--coordinator: expected HOST:PORT, found 'host'"),
    ({"coordinator": "host:x"}, "--coordinator: expected HOST:PORT, found 'host:x'"),
    ({"coordinator": "host:0"}, "--coordinator: expected a port from 1 to 65535, found 0"),
    ({"coordinator": "host:65536"}, "--coordinator: expected a port from 1 to 65535, found 65536"),
    ({"processes": "²"}, "--processes: expected a whole number from 1, found '²'"),
    ({"processes": "0"}, "--processes: expected a whole number from 1, found '0'"),
    ({"process": "two"}, "--process: expected a whole number from 0, found 'two'"),
    ({"process": "4"}, "--process: 4 of 4; they are counted from 0"),
  ],
)  # fmt: skip
def test_wrong_flags_are_one_error(
  asked: list[tuple], change: dict[str, Any], message: str
) -> None:
  flags = {k: v for k, v in (FLAGS | change).items() if v is not None}
  with pytest.raises(ConfigError, match=message):
    processes.start(flags)
  assert not asked


def test_the_command_takes_them(
  asked: list[tuple], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  assert train_tool.PROCESS_FLAGS == processes.FLAGS
  monkeypatch.setattr(recipes, "load", lambda value: Config())
  assert cli.main(["train", "--config=x.py", "--workdir=x", "--process=1"]) == 1
  assert "no --coordinator; no --processes; several processes" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("environment", "name"),
  [
    ({}, None),
    ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "n0"}, None),
    ({"SLURM_NTASKS": "2"}, None),  # in an allocation, but not started by srun
    ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "n[0-1]"}, "SLURM (srun)"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI (mpirun)"),
    ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "GKE TPU slice"),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "several TPU slices"),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
    ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
     "indexed Kubernetes job"),
    ({"TPU_ML_PLATFORM": "JAX"}, "Cloud TPU VM"),
    ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, None),
  ],
)  # fmt: skip
def test_environments_are_recognized(
  asked: list[tuple], environment: dict[str, str], name: str | None
) -> None:
  assert processes.detected(environment) == name
  processes.os.environ.update(environment)
  processes.start()
  assert [arguments for arguments, _ in asked] == [()] * (name is not None)
