"""What a launcher runs on each worker: trains once, is followed again, is asked to stop."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.test_launchers import program

TRAINING = """
trap 'echo saved; exit 75' TERM
echo "$@"; touch started
while [ ! -f finish ]; do sleep 0.05; done
exit "$(cat finish)"
"""


# What decides whether a worker installs anew.
INSTALLED = ("setup.py", "pyproject.toml", "constraints.txt")


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Path]:
  folder = tmp_path / "llava-sp-jax"
  (folder / "scripts").mkdir(parents=True)
  (folder / ".venv" / "bin").mkdir(parents=True)
  for name in (*INSTALLED, "scripts/on_worker.sh"):
    shutil.copy(REPOSITORY / name, folder / name)
  state = subprocess.check_output(f"cat {' '.join(INSTALLED)} | cksum", shell=True, cwd=folder)
  (folder / ".venv" / "installed-tpu").write_bytes(state)
  program(folder / ".venv" / "bin", "llava-sp", TRAINING)
  yield folder
  (folder / "finish").write_text("0")  # also after a failure nothing goes on running


def on_worker(folder: Path, *options: str) -> subprocess.Popen:
  return subprocess.Popen(
    ["bash", str(folder / "scripts" / "on_worker.sh"), *options],
    cwd="/",
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def wait_for(path: Path) -> None:
  give_up = time.monotonic() + 60
  while not path.exists():
    assert time.monotonic() < give_up, f"no {path}"
    time.sleep(0.02)


def test_a_worker_trains_once_and_is_followed_again(worker: Path) -> None:
  """The connection breaks; training stays; the same command follows it and gets its code."""
  command = ["--setup", "echo set up >> setup.txt", "--", "--config", "a b"]
  first = on_worker(worker, *command)
  wait_for(worker / "started")
  os.killpg(first.pid, signal.SIGKILL)  # all that belongs to the connection
  first.communicate(timeout=60)
  second = on_worker(worker, *command)
  (worker / "finish").write_text("7")
  printed, errors = second.communicate(timeout=60)
  assert second.returncode == 7, errors
  assert printed == "train --config a b\n"
  assert (worker / "setup.txt").read_text() == "set up\n"


def test_a_worker_is_asked_to_stop(worker: Path) -> None:
  training = on_worker(worker, "--setup", "", "--", "--config", "x")
  wait_for(worker / "started")
  stop = on_worker(worker, "--stop")
  stop.communicate(timeout=60)
  assert stop.returncode == 0
  printed, errors = training.communicate(timeout=60)
  assert training.returncode == 75, errors
  assert printed == "train --config x\nsaved\n"
  assert on_worker(worker, "--stop").communicate(timeout=60)[1] == "nothing to stop\n"
