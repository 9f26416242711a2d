"""A run that was killed starts again without compiling what its first start has compiled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, ConfigMaker
from tests.end_to_end import cluster

# The command, with a count of the programs that the cache had and had not; SIGKILL in a step.
PROGRAM = """
import collections, os, signal, sys, time
from pathlib import Path
from llava_sp_jax import cli, environment
environment.prepare([])
import jax
from llava_sp_jax.training import ledger
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.split("/")[-1]]))
step, dies = ledger.Ledger.step, {dies}
def dying(self, number, *samples):
  if number == dies:
    while not Path(sys.argv[2].partition("=")[2], "checkpoints", "2").exists():
      time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
  step(self, number, *samples)
ledger.Ledger.step = dying
code = cli.main(["train", *sys.argv[1:]])
print(code, counts["cache_hits"], counts["cache_misses"])
"""


@pytest.mark.guard
def test_the_second_start_reads_what_the_first_has_compiled(
  tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  config = tiny_config("pretrain", "none", train={"steps": 4, "save_every": 2, "sinks": ()})
  file, run = cluster.write_config(config, tmp_path / "recipe.py"), tmp_path / "run"

  def start(dies: int = 0) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    return subprocess.run(
      [sys.executable, "-c", PROGRAM.format(dies=dies), f"--config={file}", f"--workdir={run}"],
      env=kept | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")},
      capture_output=True,
      text=True,
      cwd=REPOSITORY,
      check=False,
    )

  def programs() -> list[str]:
    return sorted(p.name.split("-")[0] for p in (tmp_path / "cache").rglob("*-cache"))

  assert start(dies=4).returncode == -9
  assert cluster.saved(run) == [2]
  shutil.copytree(run, tmp_path / "copy")
  first = programs()
  assert first.count("jit_train_step") == 1
  code, hits, misses = map(int, (second := start()).stdout.split()[-3:])
  assert code == 0, second.stderr
  assert f"continuing {run} from step 2" in second.stdout
  assert hits >= 1
  assert programs().count("jit_train_step") == 1
  assert misses == len(programs()) - len(first)  # what only a resume needs
  shutil.rmtree(run)
  shutil.move(tmp_path / "copy", run)
  assert tuple(map(int, start().stdout.split()[-3:])) == (0, hits + misses, 0)
