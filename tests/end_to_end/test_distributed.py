"""Several real processes over gloo train as one; they stop together, and none waits for the dead."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.tools.train import STOPPED_EARLY
from llava_sp_jax.training import ledger, loop
from tests.conftest import REPOSITORY, ConfigMaker
from tests.end_to_end import cluster, kill_trials
from tests.end_to_end.cluster import Cluster, Topology

STEPS, BATCH, SAMPLES = 24, 8, 12
TWO = Topology(2, 1, (1, 2, 1))


@pytest.fixture(scope="module")
def config(tiny_config: ConfigMaker) -> config_lib.Config:
  return tiny_config(
    "finetune",
    "cropping",
    train={"steps": STEPS, "batch_size": BATCH},
    optimizer={"learning_rate": 1e-3, "projector_learning_rate": 1e-3},
  )


@pytest.fixture(scope="module")
def config_file(config: config_lib.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
  return cluster.write_config(config, tmp_path_factory.mktemp("config") / "tiny.py")


@pytest.fixture(scope="module")
def alone(config: config_lib.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The run folder of one process, this one, with eight devices."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  loop.train(config, workdir)
  return workdir


@pytest.mark.guard
def test_told_alone_they_stop_together_and_one_process_goes_on(
  config: config_lib.Config, config_file: Path, alone: Path, tmp_path: Path
) -> None:
  """SIGTERM to one of two: both save the same step. Then one process with eight devices ends it."""
  workdir = tmp_path / "run"
  two = Cluster(config_file, workdir, TWO)
  assert two.wait_for(lambda: "trainable parameters" in two.printed())
  two.send(signal.SIGTERM, 1)
  assert two.wait(cluster.GRACE) == [STOPPED_EARLY] * 2
  printed = two.printed()
  step = cluster.last_step(workdir)
  assert 0 < step < STEPS
  assert cluster.saved(workdir) == [step]
  assert f"asked to stop: saved step {step} in " in printed
  assert "trainable parameters" not in two.printed(1), "one process speaks"
  np.testing.assert_allclose(cluster.losses(workdir), cluster.losses(alone)[:step], atol=1e-5)
  books = {line["rows"][0]: line["rows"] for line in ledger.read(workdir)}
  assert books == {0: [0, 1, 2, 3], 4: [4, 5, 6, 7]}, "each reads its half"
  assert loop.train(config, workdir).step == STEPS
  np.testing.assert_allclose(cluster.losses(workdir), cluster.losses(alone), atol=1e-5)
  assert cluster.samples(workdir) == cluster.samples(alone)
  assert ledger.check(workdir, STEPS, BATCH, range(SAMPLES)) == ledger.Totals(
    STEPS, STEPS * BATCH, STEPS * BATCH, 0, 0
  )


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
  config_file: Path, tmp_path: Path, hangs: str, told: str
) -> None:
  """Where all wait, the step before is saved; where some have begun the step, all leave."""
  file = tmp_path / "hanging.py"
  hook = HANG.format(folder=str(tmp_path), hangs=hangs, rows=3 * BATCH // 2)
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
@pytest.mark.parametrize(
  "topology",
  [
    *(
      pytest.param(Topology(*sizes), marks=pytest.mark.slow)
      for sizes in ((4, 1, (2, 2, 1)), (2, 2, (2, 2, 1)), (4, 1, (1, 2, 2)))
    ),
    Topology(2, 1, (1, 1, 2)),
  ],
  ids=str,
)
def test_losses_of_one(config_file: Path, alone: Path, tmp_path: Path, topology: Topology) -> None:
  """Also where the tensor axis crosses processes, which then read the same rows."""
  Cluster(config_file, tmp_path / "run", topology).finish()
  np.testing.assert_allclose(cluster.losses(tmp_path / "run"), cluster.losses(alone), atol=1e-5)
  assert cluster.samples(tmp_path / "run") == cluster.samples(alone)


@pytest.mark.slow
def test_samples_that_are_measured_in_shares_are_packed_as_one(
  config: config_lib.Config, tmp_path: Path
) -> None:
  data = dataclasses.replace(config.data, packing="first_fit", images_per_row=3)
  train = dataclasses.replace(config.train, steps=3)
  packed = dataclasses.replace(config, data=data, train=train)
  loop.train(packed, tmp_path / "alone")
  two = Cluster(cluster.write_config(packed, tmp_path / "packed.py"), tmp_path / "run", TWO)
  two.finish()
  assert "by 2 processes: 0 cannot be used" in two.printed()
  assert cluster.samples(tmp_path / "run") == cluster.samples(tmp_path / "alone")
  np.testing.assert_allclose(
    cluster.losses(tmp_path / "run"), cluster.losses(tmp_path / "alone"), atol=1e-5
  )


@pytest.mark.guard
def test_two_slices_train_as_one(config_file: Path, alone: Path, tmp_path: Path) -> None:
  two = Topology(2, 2, (2, 2, 1))
  Cluster(config_file, tmp_path / "run", two, "--config.mesh.slices=2").finish()
  np.testing.assert_allclose(cluster.losses(tmp_path / "run"), cluster.losses(alone), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", kill_trials.RECIPES)
def test_a_kill_trial(
  tiny_data: Path, tiny_config: ConfigMaker, tmp_path: Path, recipe: str
) -> None:
  """One of the trials of `scripts/kill_trials.py` for each recipe, on changing topologies."""
  trial = kill_trials.Trial(recipe, "2, 1, 4", "save", "all")
  record = kill_trials.Trials(tmp_path, tiny_config).run(0, trial)
  assert record.passed, dataclasses.asdict(record)


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
