"""Start-up by flags and environments; a process that fails or stands still ends itself."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from llava_sp_jax import cli, recipes
from llava_sp_jax.config import Config, ConfigError
from llava_sp_jax.distributed import notices, processes
from llava_sp_jax.distributed.watchdog import Watchdog
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


def wait_until(condition: Any) -> None:
  until = time.monotonic() + 30
  while not condition() and time.monotonic() < until:
    time.sleep(0.01)


def test_standing_still_ends_the_process(capsys: pytest.CaptureFixture) -> None:
  left: list[int] = []
  with Watchdog(0.2, left.append) as watchdog:
    time.sleep(0.5)
    assert not left, "the first step may take its time"
    watchdog.beat(7)
    wait_until(lambda: left)
  assert left[0] == 1
  assert "process 0 of 1 stops: no step since step 7, 0 s ago" in capsys.readouterr().err


def test_steps_keep_it_alive() -> None:
  left: list[int] = []
  with Watchdog(0.4, left.append) as watchdog:
    for step in range(12):
      watchdog.beat(step)
      time.sleep(0.05)
  assert not left


def test_an_error_among_several_ends_at_once(
  capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  left: list[int] = []
  with pytest.raises(ConfigError), Watchdog(0, left.append):
    raise ConfigError("a single process raises it")
  assert not left
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  watchdog = Watchdog(0, left.append)
  watchdog.beat(3)
  with pytest.raises(ConfigError), watchdog:
    raise ConfigError("no such thing")
  assert left == [1]
  assert capsys.readouterr().err == "llava-sp: process 0 of 4 stops: ConfigError: no such thing\n"
  with pytest.raises(OSError, match="peer"), watchdog:
    raise OSError("connection closed by peer")
  assert "process 0 of 4 stops: failed after step 3 (above). If the error names a connection" in (
    capsys.readouterr().err
  )


class Keys:
  """Values of JAX's coordination service, which may be set once."""

  def __init__(self) -> None:
    self.values: dict[str, str] = {}

  def key_value_set(self, key: str, value: str) -> None:
    if key in self.values:
      raise RuntimeError(f"ALREADY_EXISTS: {key}")
    self.values[key] = value

  def key_value_try_get(self, key: str) -> str:
    if key not in self.values:
      raise RuntimeError(f"NOT_FOUND: {key}")
    return self.values[key]


def test_the_error_of_one_ends_the_others(
  capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  """What the first has said is what all say, even where another one failed as a consequence."""
  keys, left = Keys(), list[int]()
  monkeypatch.setattr(notices, "_client", lambda: keys)
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_count", lambda: 3)

  def fails(process: int, error: Exception) -> str:
    monkeypatch.setattr(jax, "process_index", lambda: process)
    with pytest.raises(type(error)), Watchdog(0, left.append):
      raise error
    return str(capsys.readouterr().err)

  why = "process 1 of 3: ValueError: twice"
  assert "process 1 of 3 stops: failed after step 0 (above)" in fails(1, ValueError("twice"))
  assert f"llava-sp: process 2 of 3 stops: {why}\n" in fails(2, OSError("connection closed"))
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  count = len(left)
  with Watchdog(0.2, left.append):
    wait_until(lambda: len(left) > count)
  assert f"llava-sp: process 0 of 3 stops: {why}\n" in capsys.readouterr().err
  assert set(left) == {1}


def test_the_first_cause_is_named_although_that_process_takes_its_time(
  capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  """While process 1 closes its files, a connection of process 2 breaks: a consequence."""
  keys, left = Keys(), list[int]()
  monkeypatch.setattr(notices, "_client", lambda: keys)
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_count", lambda: 3)

  def process(number: int) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: number)

  def fail(error: Exception, meanwhile: Callable[[], None]) -> None:
    dog, closing = Watchdog(0, left.append), contextlib.ExitStack()
    closing.callback(meanwhile)
    with pytest.raises(type(error)), dog, closing, dog.noting():
      raise error

  def consequence() -> None:
    """What becomes of process 2, before process 1 has ended."""
    assert left == []
    process(2)
    fail(OSError("connection closed"), lambda: None)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "llava-sp: OSError: connection closed"
    assert second == f"llava-sp: process 2 of 3 stops: {why}"
    process(1)

  why = "process 1 of 3: ValueError: twice (that process failed first)"
  process(1)
  fail(ValueError("twice"), consequence)
  assert set(left) == {1}
  assert keys.values[notices.ABORTED].endswith(why)


# Adds up a number over all processes for ever; argv: address, count, index, file that says "begun".
LOOP = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
from llava_sp_jax.distributed import processes
from llava_sp_jax.distributed.watchdog import Watchdog
address, count, index, begun = sys.argv[1:]
flags = {"coordinator": address, "processes": count, "process": index}
processes.start(flags, peer_seconds=10)
with Watchdog(0) as watchdog:
  processes.barrier("start")
  for step in range(10**9):
    multihost_utils.process_allgather(jnp.ones(()))
    watchdog.beat(step)
    Path(begun).touch()
"""


# `llava-sp eval` whose second process needs longer than others may wait; argv as above.
EARLY = """
import sys, time
import jax
from llava_sp_jax.distributed import processes
from llava_sp_jax.tools import benchmark_options, evaluate
address, count, index = sys.argv[1:]
processes.BARRIER_SECONDS = 1
def answer(tasks, options):
  jax.devices()  # all have begun
  time.sleep(4 * int(index))
  return {}
evaluate._evaluate, benchmark_options._task = answer, lambda *_: None
evaluate.main(["--data=x", f"--coordinator={address}", f"--processes={count}", f"--process={index}"])
"""


def test_one_that_is_done_early_waits_for_those_that_answer() -> None:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  two = [
    subprocess.Popen(
      [sys.executable, "-c", EARLY, address, "2", str(i)],
      cwd=REPOSITORY,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  said = [process.communicate(timeout=300)[1] for process in two]
  assert [process.returncode for process in two] == [0, 0], said


@pytest.mark.parametrize("victim", [1, 0], ids=["second", "coordinator"])
def test_the_death_of_one_ends_the_other(tmp_path: Path, victim: int) -> None:
  with socket.socket() as free:
    free.bind(("localhost", 0))
    address = f"localhost:{free.getsockname()[1]}"
  two = [
    subprocess.Popen(
      [sys.executable, "-c", LOOP, address, "2", str(i), str(tmp_path / f"begun{i}")],
      cwd=REPOSITORY,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  until = time.monotonic() + 600
  while len(list(tmp_path.iterdir())) < 2:
    assert time.monotonic() < until
    assert [process.poll() for process in two] == [None, None]
    time.sleep(0.05)
  two[victim].send_signal(signal.SIGKILL)
  said = two[1 - victim].communicate(timeout=120)[1]  # a TimeoutExpired when it hangs
  assert two[1 - victim].returncode not in (0, -signal.SIGKILL)
  assert f"process {1 - victim} of 2 stops: failed after step" in said or (
    "JAX distributed service detected" in said
  )
  two[victim].communicate()


def test_a_full_disk_does_not_keep_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
  """Whose messages go to a file on it."""

  class Full:
    def write(self, _: str) -> int:
      raise OSError(28, "No space left on device")

    def flush(self) -> None:
      self.write("")

  left: list[int] = []
  monkeypatch.setattr(notices.os, "_exit", left.append)
  monkeypatch.setattr(sys, "stderr", Full())
  monkeypatch.setattr(sys, "stdout", Full())
  notices.abort("the disk is full", 7)
  assert left == [7]
