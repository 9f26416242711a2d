"""Two processes with a disk each are killed between two checkpoints, and resume from their disks."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import ConfigMaker
from tests.end_to_end import cluster, kill_trials
from tests.end_to_end.cluster import Cluster

STEPS, EVERY = 24, 10


def kept(disk: Path, process: int) -> list[int]:
  """Steps that are whole on the disk of a process."""
  return sorted(int(file.stem) for file in disk.glob(f"*/process-{process}/*.json"))


@pytest.mark.guard
def test_killed_between_checkpoints_they_resume_to_the_bit(
  tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  """Then a host loses its disk: all resume from the run folder, and one line says so."""
  config = tiny_config(
    "finetune",
    "cropping",
    train={"steps": STEPS, "save_every": EVERY, "local_every": 3, "peer_seconds": 1000},
    optimizer={"learning_rate": 1e-3, "projector_learning_rate": 1e-3},
  )
  file, run, disk = (
    cluster.write_config(config, tmp_path / "tiny.py"),
    tmp_path / "run",
    tmp_path / "disk",
  )
  option = f"--config.train.local_folder={disk}"
  Cluster(file, tmp_path / "unbroken", kill_trials.TWO).finish()

  def killed_after(step: int) -> int:
    """Kills both once they hold `step` on their disks; returns the newest that both hold."""
    two = Cluster(file, run, kill_trials.TWO, option)
    assert two.wait_for(lambda: all(step in kept(disk, process) for process in range(2)), 0.001)
    two.kill()
    return max({*kept(disk, 0)} & {*kept(disk, 1)})

  newest = killed_after(15)
  saved = cluster.saved(run)[-1]
  assert saved < newest
  copy = Path(shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-copy")))
  said = Cluster(file, run, kill_trials.TWO, option).finish()
  assert f"continuing {run} from step {newest}, which is on the disks of its hosts" in said
  assert kill_trials.numbers(run) == kill_trials.numbers(tmp_path / "unbroken")
  assert kill_trials.checksums(run) == kill_trials.checksums(tmp_path / "unbroken")
  assert cluster.samples(run) == cluster.samples(tmp_path / "unbroken")
  assert not list(disk.iterdir())

  shutil.rmtree(run)
  shutil.copytree(copy / "run", run)
  shutil.copytree(copy / "disk", disk, dirs_exist_ok=True)
  (of_one,) = disk.glob("*/process-1")
  shutil.rmtree(of_one)
  said = Cluster(file, run, kill_trials.TWO, option).finish()
  line = f"{run}: step {newest} is not on the disks of all hosts (process 1 has not); step {saved} "
  assert said.count(line) == 1
  assert f"continuing {run} from step {saved}\n" in said
  assert kill_trials.numbers(run) == kill_trials.numbers(tmp_path / "unbroken")
  assert kill_trials.checksums(run) == kill_trials.checksums(tmp_path / "unbroken")
