"""Real processes are killed in the middle of training; what follows is equal to the last bit."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import own_folders, runs, stream
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.training import loop
from tests.conftest import DEVICES_FLAG, REPOSITORY, ConfigMaker
from tests.end_to_end.cluster import GRACE, metrics, saved
from tests.end_to_end.kill_trials import numbers

STEPS, SAVE_EVERY = 14, 3
PATIENCE = 180  # seconds until a process that should be doing something is given up


def command(config_file: Path, workdir: Path) -> list[str]:
  return [
    sys.executable,
    "-m",
    "llava_sp_jax.cli",
    "train",
    f"--config={config_file}",
    f"--workdir={workdir}",
  ]


def environment() -> dict[str, str]:
  """This process's environment with one device."""
  flags = os.environ.get("XLA_FLAGS", "").replace(DEVICES_FLAG, "").strip()
  return {**os.environ, "XLA_FLAGS": flags}


def start(config_file: Path, workdir: Path) -> subprocess.Popen:
  return subprocess.Popen(
    command(config_file, workdir),
    env=environment(),
    cwd=REPOSITORY,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def finish(config_file: Path, workdir: Path) -> str:
  """Runs to the end; what it printed."""
  done = subprocess.run(
    command(config_file, workdir),
    env=environment(),
    cwd=REPOSITORY,
    text=True,
    capture_output=True,
    timeout=PATIENCE,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def wait_for(process: subprocess.Popen, condition: Any, pause: float = 0.02) -> bool:
  """Polls until `condition()`; False when the process ended before."""
  until = time.monotonic() + PATIENCE
  while time.monotonic() < until:
    if condition():
      return True
    if process.poll() is not None:
      return False
    time.sleep(pause)
  process.kill()
  raise AssertionError(f"nothing happened for {PATIENCE} s: {process.communicate()}")


@pytest.fixture(scope="module")
def config(tiny_config: ConfigMaker) -> config_lib.Config:
  return tiny_config(
    "finetune",
    "cropping",
    train={"steps": STEPS, "save_every": SAVE_EVERY, "batch_size": 4},
    data={"turns_per_row": 2, "augment": "mirror_shift"},  # draws of the data's own rng, too
  )


@pytest.fixture(scope="module")
def unbroken(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The run folder of a run that nobody disturbed."""
  workdir = tmp_path_factory.mktemp("unbroken") / "run"
  finish(config_file, workdir)
  assert [line[0] for line in numbers(workdir)] == list(range(1, STEPS + 1))
  assert len({line[1] for line in numbers(workdir)}) == STEPS, "every step has a loss of its own"
  return workdir


def same_trained_parameters(ours: Path, theirs: Path) -> None:
  assert same_parameters(ours, theirs) == STEPS


def same_parameters(ours: Path, theirs: Path) -> int:
  """Compares the trained parameters of the last checkpoints, and returns their step."""
  (one, _, step), (two, _, other) = (runs.saved(folder) for folder in (ours, theirs))
  a, b = ({p: x.read() for p, x in stream.SavedItem(item).leaves().items()} for item in (one, two))
  assert step == other
  assert a.keys() == b.keys()
  for path in a:
    np.testing.assert_array_equal(a[path], b[path], err_msg=path)
  return step


@pytest.mark.guard
def test_killed_between_saves(unbroken: Path, config_file: Path, tmp_path: Path) -> None:
  workdir = tmp_path / "run"
  process = start(config_file, workdir)
  assert wait_for(process, lambda: len(metrics(workdir)) >= 5 and saved(workdir))
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert process.returncode == -signal.SIGKILL
  before = saved(workdir)[-1]
  assert before < STEPS
  printed = finish(config_file, workdir)
  assert f"continuing {workdir} from step {before}" in printed
  assert numbers(workdir) == numbers(unbroken)
  same_trained_parameters(workdir, unbroken)


@pytest.mark.guard
def test_killed_in_the_middle_of_a_save(unbroken: Path, config_file: Path, tmp_path: Path) -> None:
  """What a save leaves half done is never taken for a checkpoint."""
  for attempt in range(5):
    workdir = tmp_path / f"run{attempt}"
    half_done = lambda w=workdir: list((w / "checkpoints").glob("*orbax-checkpoint-tmp*"))  # noqa: E731
    process = start(config_file, workdir)
    if not wait_for(process, half_done, pause=0.002):
      process.communicate()
      continue
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if half_done():
      break
  else:
    pytest.fail("no save could be interrupted in five attempts")
  whole = saved(workdir)
  finish(config_file, workdir)
  assert numbers(workdir) == numbers(unbroken)
  same_trained_parameters(workdir, unbroken)
  assert not half_done(), "the rest of the broken save is still there"
  assert set(saved(workdir)) != set(whole)


@pytest.mark.guard
@pytest.mark.parametrize(
  "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_asked_to_stop(
  unbroken: Path, config_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
  workdir = tmp_path / "run"
  process = start(config_file, workdir)
  assert wait_for(process, lambda: len(metrics(workdir)) >= 2)
  process.send_signal(number)
  printed, errors = process.communicate(timeout=GRACE)
  assert process.returncode == 75, errors  # not complete: launchers go on
  last = metrics(workdir)[-1]["step"]
  assert last < STEPS
  said = rf"asked to stop: saved step {last} in \d+\.\d s; the same command resumes from there"
  assert re.search(said, printed)
  assert saved(workdir)[-1] == last
  assert numbers(workdir) == numbers(unbroken)[:last]
  assert f"continuing {workdir} from step {last}" in finish(config_file, workdir)
  assert numbers(workdir) == numbers(unbroken)
  same_trained_parameters(workdir, unbroken)


@pytest.mark.guard
def test_a_finished_run_stays_as_it_is(unbroken: Path, config: config_lib.Config) -> None:
  before = numbers(unbroken)
  assert loop.train(on_eight_devices(config), unbroken).step == STEPS
  assert numbers(unbroken) == before
  assert saved(unbroken)[-1] == STEPS


def on_eight_devices(config: config_lib.Config) -> config_lib.Config:
  """The config on a mesh of this process, where four rows do not go over eight devices."""
  return dataclasses.replace(config, mesh=config_lib.MeshConfig(data=1, fsdp=4, tensor=2))


def test_a_contradiction_shows_both_values(unbroken: Path, config: config_lib.Config) -> None:
  optimizer = dataclasses.replace(config.optimizer, learning_rate=0.125)
  other = dataclasses.replace(config, optimizer=optimizer)
  with pytest.raises(CheckpointError) as error:
    loop.train(other, unbroken)
  line = f"config.optimizer.learning_rate: 0.125 here, {config.optimizer.learning_rate} there"
  assert line in str(error.value)


def test_what_does_not_change_the_numbers_may_change(
  unbroken: Path, config: config_lib.Config
) -> None:
  train = dataclasses.replace(config.train, save_every=5, log_every=2, keep=4)
  data = dataclasses.replace(config.data, threads=config.data.threads + 1, processes=3)
  changed = dataclasses.replace(on_eight_devices(config), train=train, data=data)
  runs.check_config(unbroken, changed)


@pytest.fixture
def other_base(unbroken: Path, config: config_lib.Config, tmp_path: Path) -> Path:
  """A copy of the run whose config leads to another frozen base."""
  import shutil

  folder = tmp_path / "copy"
  shutil.copytree(unbroken, folder)
  changed = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=7))
  (folder / runs.CONFIG_FILE).write_text(config_lib.to_json(changed))
  return folder


def test_fingerprint_refuses_another_base_when_training_goes_on(other_base: Path) -> None:
  changed = on_eight_devices(runs.read_config(other_base))
  with pytest.raises(CheckpointError, match="its frozen base has fingerprint"):
    loop.train(changed, other_base)


def test_fingerprint_refuses_another_base_when_loading(other_base: Path, unbroken: Path) -> None:
  with pytest.raises(CheckpointError, match="its frozen base has fingerprint"):
    own_folders.open_own(other_base)
  assert own_folders.open_own(unbroken).step == STEPS


@pytest.mark.guard
@pytest.mark.parametrize("variant", [pytest.param("none", marks=pytest.mark.slow), "pooling"])
def test_second_stage_starts_from_the_first(
  tiny_config: ConfigMaker, tmp_path: Path, variant: str
) -> None:
  """Stage 2 takes all of stage 1; only adapters and projector learn, and they do."""
  first = tiny_config("pretrain_all", variant, train={"steps": 2})
  loop.train(first, tmp_path / "one")
  second = tiny_config(
    "finetune", variant, train={"steps": 3}, init={"checkpoint": str(tmp_path / "one")}
  )
  loop.train(second, tmp_path / "two")
  before, after = (own_folders.open_own(tmp_path / name).params() for name in ("one", "two"))
  adapters = {p for p in after if "lora_" in p}
  assert adapters == set(after) - set(before)
  assert len(adapters) == 14  # A and B of seven linear layers
  changed = {p for p in before if not np.array_equal(before[p], after[p])}
  assert changed == {p for p in before if p.startswith("projector/")}
  assert all(np.any(after[p]) for p in adapters if p.endswith("lora_b"))
  item, about, _ = runs.saved(tmp_path / "two")
  assert set(stream.SavedItem(item).leaves()) == adapters | changed
  assert about["stage"] == "finetune"


@pytest.mark.guard
def test_second_stage_refuses_an_unfinished_first(tiny_config: ConfigMaker, tmp_path: Path) -> None:
  first = tiny_config("pretrain_all", train={"steps": 2})
  loop.train(first, tmp_path / "one")
  longer = dataclasses.replace(first, train=dataclasses.replace(first.train, steps=9))
  (tmp_path / "one" / runs.CONFIG_FILE).write_text(config_lib.to_json(longer))
  second = tiny_config("finetune", init={"checkpoint": str(tmp_path / "one")})
  with pytest.raises(CheckpointError, match="stopped at step 2 of 9; finish it first"):
    loop.train(second, tmp_path / "two")


@pytest.mark.guard
def test_second_stage_refuses_another_row(tiny_config: ConfigMaker, tmp_path: Path) -> None:
  """Parameters that stage 1 does not have are all named."""
  loop.train(tiny_config("pretrain_all", "none", train={"steps": 1}), tmp_path / "one")
  second = tiny_config("finetune", "pooling", init={"checkpoint": str(tmp_path / "one")})
  with pytest.raises(ValueError, match=r"(?s)missing projector/pool_0/kernel.*projector/pool_5"):
    loop.train(second, tmp_path / "two")
