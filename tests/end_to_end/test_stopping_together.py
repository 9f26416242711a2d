"""Several real processes stop together, refuse together, and none waits for the dead."""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.tools.train import STOPPED_EARLY
from tests.conftest import REPOSITORY
from tests.end_to_end import cluster
from tests.end_to_end.cluster import Cluster
from tests.end_to_end.kill_trials import TWO

HANG = """

import pathlib
import sys
import threading

from llava_sp_jax.data import prefetch

begin, me = prefetch.Prefetcher.__init__, next(a for a in sys.argv if a.startswith("--process="))[-1]


def hanging(self, make, start, *sizes):
  def slow(number):
    if me in {hangs!r} and number >= {rows}:
      pathlib.Path({folder!r}, "hangs" + me).touch()
      threading.Event().wait()
    return make(number)

  begin(self, slow, start, *sizes)


prefetch.Prefetcher.__init__ = hanging
"""


@pytest.mark.guard
@pytest.mark.parametrize(
  ("hangs", "told"),
  [("01", "1"), pytest.param("01", "01", marks=pytest.mark.slow),
   pytest.param("1", "01", marks=pytest.mark.slow),
   pytest.param("0", "0", marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_wait_for_data_ends_in_all(
  config: config_lib.Config, config_file: Path, tmp_path: Path, hangs: str, told: str
) -> None:
  """Where all wait, the step before is saved; where some have begun the step, all leave."""
  file = tmp_path / "hanging.py"
  rows = 3 * config.train.batch_size // 2
  hook = HANG.format(folder=str(tmp_path), hangs=hangs, rows=rows)
  file.write_text(config_file.read_text() + hook)
  two = Cluster(file, tmp_path / "run", TWO, "--config.train.save_every=100")
  assert two.wait_for(lambda: all((tmp_path / f"hangs{process}").exists() for process in hangs))
  assert two.wait_for(lambda: cluster.last_step(two.workdir) == 3)
  time.sleep(1)
  for process in told:
    two.send(signal.SIGTERM, int(process))
  assert two.wait() == [STOPPED_EARLY] * 2, two.printed() + two.printed(1)  # else it hangs
  assert cluster.saved(two.workdir) == ([3] if hangs == "01" else [])
  for process in range(2):
    said = two.printed(process)
    assert ("asked to stop, and no data came for" in said) == (hangs != "01")
    assert "Traceback" not in said
    assert "Check failure" not in said


@pytest.mark.guard
def test_the_death_of_one_ends_the_other(config_file: Path, tmp_path: Path) -> None:
  """`tests/distributed/test_processes.py` has this without a model, for either of the two."""
  two = Cluster(
    config_file,
    tmp_path / "run",
    TWO,
    "--config.train.peer_seconds=20",
    "--config.train.steps=100000",
  )
  assert two.wait_for(lambda: cluster.last_step(two.workdir) >= 2)
  two.send(signal.SIGKILL, 1)
  codes = two.wait()  # an AssertionError when it hangs
  assert codes[1] == -signal.SIGKILL
  assert codes[0] not in (0, -signal.SIGKILL)
  said = two.printed(0)
  assert "stops: failed after step" in said or "JAX distributed service detected" in said


@pytest.mark.guard
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_checkpoint_that_one_cannot_write_ends_all(
  config_file: Path, tmp_path: Path, victim: int
) -> None:
  """Its thread fails long after the step; the other would wait for it in Orbax for 20 minutes.

  What it prints itself may not fit into its log any more.
  """
  two = Cluster(
    config_file,
    tmp_path / "run",
    TWO,
    "--config.train.steps=100000",
    "--config.train.save_every=10",
    "--config.train.peer_seconds=1000",
  )
  assert two.wait_for(lambda: cluster.saved(two.workdir))
  small = 40_000  # bytes of a file: more than a log, less than the arrays of a process
  resource.prlimit(two.processes[victim].pid, resource.RLIMIT_FSIZE, (small, small))
  assert two.wait(120) == [1, 1]
  assert cluster.saved(two.workdir)[-1] < cluster.last_step(two.workdir)
  why = rf"CheckpointError: {two.workdir}: a step could not be saved \(.*Error writing"
  other = rf"process {1 - victim} of 2 stops: process {victim} of 2: {why}"
  assert re.search(other, two.printed(1 - victim))
  assert "Traceback" not in two.printed(1 - victim)


UNREADABLE = """

import sys

import orbax.checkpoint as ocp

read = ocp.StandardCheckpointHandler.restore


def unreadable(self, directory, *arguments, **more):
  if "--process=1" in sys.argv and "/checkpoints/{step}/" in str(directory):
    raise OSError(5, "Input/output error")
  return read(self, directory, *arguments, **more)


ocp.StandardCheckpointHandler.restore = unreadable
"""


@pytest.mark.guard
def test_a_step_that_one_cannot_read_is_set_aside_by_all(config_file: Path, tmp_path: Path) -> None:
  """The other would wait for it in Orbax, and nobody would say why."""
  options = ("--config.train.steps=100000", "--config.train.save_every=2")
  two = Cluster(config_file, tmp_path / "run", TWO, *options)
  assert two.wait_for(lambda: len(cluster.saved(two.workdir)) > 1)
  two.kill()
  before, newest = cluster.saved(two.workdir)[-2:]
  file = tmp_path / "unreadable.py"
  file.write_text(config_file.read_text() + UNREADABLE.format(step=newest))
  again = Cluster(file, two.workdir, TWO, *options)
  assert again.wait_for(lambda: "trainable parameters" in again.printed())
  assert again.wait_for(lambda: f"continuing {two.workdir} from step {before}\n" in again.printed())
  again.send(
    signal.SIGTERM, 0
  )  # before the first step since the start, whose number JAX cannot know
  assert again.wait(cluster.GRACE) == [STOPPED_EARLY] * 2
  assert cluster.last_step(two.workdir) == before + 1
  why = f"WARNING: step {newest}: process 1: CheckpointError: .*Input/output error"
  assert re.search(why, again.printed())
  assert (two.workdir / "aside" / str(newest)).is_dir()


@pytest.mark.guard
def test_processes_that_were_given_other_things_do_not_start(
  config: config_lib.Config, config_file: Path, tmp_path: Path
) -> None:
  """Each difference is named with its processes, in all of them."""
  data = tmp_path / "captions.json"
  data.write_text(Path(config.data.path).read_text().replace("yes", "no"))
  two = Cluster(
    config_file,
    tmp_path / "run",
    TWO,
    last=[
      "--config.optimizer.learning_rate=0.5",
      f"--config.data.path={data}",
    ],
  )
  assert two.wait() == [1, 1]
  for process in range(2):
    said = two.printed(process)
    assert "the processes of this run were not given the same:" in said
    assert "config.optimizer.learning_rate: 0.001 in process 0 (" in said
    assert "; 0.5 in process 1 (" in said
    assert "; data: " in said
    assert "tokenizer" not in said
    assert "Traceback" not in said
  assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.guard
def test_a_second_run_of_two_processes_on_a_folder_is_refused(
  config_file: Path, tmp_path: Path
) -> None:
  one = Cluster(config_file, tmp_path / "run", TWO, "--config.train.steps=100000")
  try:
    assert one.wait_for(lambda: cluster.last_step(one.workdir) >= 1)
    two = Cluster(config_file, tmp_path / "run", TWO, "--config.train.steps=100000")
    two.logs = [path.rename(path.with_suffix(".second")) for path in two.logs]
    assert two.wait() == [1, 1]
    for process in range(2):
      assert "run: in use by llava-sp train (process " in two.printed(process)
    assert [process.poll() for process in one.processes] == [None, None]
  finally:
    one.kill()


@pytest.mark.guard
def test_a_batch_that_does_not_divide_is_an_error_of_one_line(
  config_file: Path, tmp_path: Path
) -> None:
  two = Cluster(config_file, tmp_path / "run", TWO, "--config.train.batch_size=7")
  assert two.wait() == [1, 1]
  assert "train.batch_size: 7 rows cannot be divided over data*fsdp = 1*2 = 2 devices of 2 " in (
    two.printed()
  )
  assert not (tmp_path / "run").exists()


@pytest.mark.guard
def test_a_profile_has_a_trace_of_each_process(config_file: Path, tmp_path: Path) -> None:
  """Asked for while they train; the run goes on, and a second profile is another one."""
  two = Cluster(config_file, tmp_path / "run", TWO, "--config.train.steps=100000")
  try:
    assert two.wait_for(lambda: cluster.last_step(two.workdir) >= 2)
    for count in (1, 2):
      done = subprocess.run(
        [sys.executable, "-m", "llava_sp_jax.cli", "profile", str(two.workdir), "--steps=3"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=False,
      )
      assert done.returncode == 0, done.stderr
      found = re.search(r"steps (\d+) to (\d+) of 2 processes: (.*)", done.stdout)
      assert found
      first, last, place = int(found[1]), int(found[2]), Path(found[3])
      assert last - first == 2
      answers = [json.loads((place / f"process-{i}.json").read_text()) for i in range(2)]
      assert [(a["last"] - a["first"], a["error"]) for a in answers] == [(2, "")] * 2
      traces = [path for path in place.rglob("*.xplane.pb") if path.stat().st_size]
      assert len(traces) == 2, "one of each process"
      assert len([p for p in (two.workdir / "profiles").iterdir() if p.is_dir()]) == count
    step = cluster.last_step(two.workdir)
    assert two.wait_for(lambda: cluster.last_step(two.workdir) > step)
  finally:
    two.kill()
