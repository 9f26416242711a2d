"""A process that fails or stands still ends itself, and the others say why."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from llava_sp_jax.config import ConfigError
from llava_sp_jax.distributed import notices
from llava_sp_jax.distributed.watchdog import Watchdog
from tests.conftest import REPOSITORY


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
  told = r"process 0 of 1 stops: no step since step 7, \d s ago"
  assert re.search(told, capsys.readouterr().err)


def test_steps_keep_it_alive() -> None:
  left: list[int] = []
  with Watchdog(1.0, left.append) as watchdog:
    for step in range(25):
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


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Keys:
  """The service of a run of three processes, of which a test plays each in turn."""
  found = Keys()
  monkeypatch.setattr(notices, "_client", lambda: found)
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  return found


def test_the_error_of_one_ends_the_others(
  keys: Keys, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  """What the first has said is what all say, even where another one failed as a consequence."""
  left = list[int]()

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
  keys: Keys, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  """While process 1 closes its files, a connection of process 2 breaks: a consequence."""
  left = list[int]()

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
