"""Several real processes over gloo train as one."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.tools.train import STOPPED_EARLY
from llava_sp_jax.training import ledger, loop
from tests.conftest import ConfigMaker
from tests.end_to_end import cluster, kill_trials
from tests.end_to_end.cluster import Cluster, Topology
from tests.end_to_end.kill_trials import TWO

SAMPLES = 12  # of the tiny data


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
  workdir, steps = tmp_path / "run", config.train.steps
  rows = steps * config.train.batch_size
  two = Cluster(config_file, workdir, TWO)
  assert two.wait_for(lambda: "trainable parameters" in two.printed())
  two.send(signal.SIGTERM, 1)
  assert two.wait(cluster.GRACE) == [STOPPED_EARLY] * 2
  printed = two.printed()
  step = cluster.last_step(workdir)
  assert 0 < step < steps
  assert cluster.saved(workdir) == [step]
  assert f"asked to stop: saved step {step} in " in printed
  assert "trainable parameters" not in two.printed(1), "one process speaks"
  np.testing.assert_allclose(cluster.losses(workdir), cluster.losses(alone)[:step], atol=1e-5)
  books = {line["rows"][0]: line["rows"] for line in ledger.read(workdir)}
  assert books == {0: [0, 1, 2, 3], 4: [4, 5, 6, 7]}, "each reads its half"
  assert loop.train(config, workdir).step == steps
  np.testing.assert_allclose(cluster.losses(workdir), cluster.losses(alone), atol=1e-5)
  assert cluster.samples(workdir) == cluster.samples(alone)
  assert ledger.check(workdir, steps, config.train.batch_size, range(SAMPLES)) == ledger.Totals(
    steps, rows, rows, 0, 0
  )


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
