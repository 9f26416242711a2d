"""Run folders: what is no workdir is left alone, a second training is refused, a full disk is one line."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from llava_sp_jax import cli, jsonl, locks
from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import runs
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.training import loop
from tests.end_to_end import cluster
from tests.training.looker import Looker
from tests.training.test_resume import went_on


def test_a_second_training_of_a_folder_is_refused(
  run: Path, values: config_lib.Config, looker: Looker
) -> None:
  before = sorted(run.rglob("*"))
  with (
    locks.Lock(run, "llava-sp train"),
    pytest.raises(locks.LockError, match=f"in use by llava-sp train .process {os.getpid()} on "),
  ):
    loop.train(values, run)
  assert sorted(run.rglob("*")) == before
  assert not looker.seen


@pytest.mark.parametrize("name", ["metrics.jsonl", "ledger/00000.jsonl"])
def test_a_full_disk_ends_a_run_that_goes_on_afterwards(
  values: config_lib.Config, tmp_path: Path, looker: Looker, name: str
) -> None:
  """Linux's /dev/full refuses every write."""
  run = tmp_path / "run"
  (run / name).parent.mkdir(parents=True)
  (run / name).symlink_to("/dev/full")
  with pytest.raises(OSError, match="No space left on device"):
    loop.train(values, run)
  (run / name).unlink()
  looker.seen.clear()
  assert loop.train(values, run).step == 5
  went_on(run, looker, 0)


def test_a_full_disk_while_a_sample_is_written_down(
  values: config_lib.Config, tmp_path: Path, capsys: pytest.CaptureFixture, looker: Looker
) -> None:
  """One line with the file's name and a code, and the same command goes on."""
  samples, run = json.loads(Path(values.data.path).read_text()), tmp_path / "run"
  path = tmp_path / "damaged.json"
  path.write_text(json.dumps([*samples[:5], {"id": "bad"}, *samples[5:]]))
  made = dataclasses.replace(values, data=dataclasses.replace(values.data, path=str(path)))
  command = [
    "train",
    f"--config={cluster.write_config(made, tmp_path / 'c.py')}",
    f"--workdir={run}",
  ]
  run.mkdir()
  (run / "quarantine.jsonl").symlink_to("/dev/full")
  assert cli.main(command) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line == f"llava-sp train: {run / 'quarantine.jsonl'}: No space left on device"
  (run / "quarantine.jsonl").unlink()
  assert cli.main(command) == 0
  assert [line["id"] for line in jsonl.read(run / "quarantine.jsonl")[0]] == ["bad"]


def test_what_lies_beside_the_steps_is_left_alone(
  run: Path, values: config_lib.Config, looker: Looker
) -> None:
  """Links, copies and half-written steps of other names; a run in a linked folder."""
  place = run / "checkpoints"
  (place / "latest").symlink_to(place / "3")
  shutil.copytree(place / "2", place / "007")
  shutil.copytree(place / "2", place / "3.bak")
  (place / "4.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
  (place / "notes").write_text("mine")
  link = run.with_name("link")
  link.symlink_to(run)
  assert loop.train(values, link).step == 5
  went_on(run, looker, 3)
  assert {p.name for p in place.iterdir()} >= {"latest", "007", "3.bak", "notes"}


@pytest.mark.parametrize("name", ["checkpoints", "ledger", "tokenizer"])
def test_a_file_in_the_place_of_a_folder_is_named(
  values: config_lib.Config, tmp_path: Path, looker: Looker, name: str
) -> None:
  run = tmp_path / "run"
  run.mkdir()
  runs.write_config(run, values)
  (run / name).write_text("in the way")
  with pytest.raises((OSError, CheckpointError), match=f"{run / name}"):
    loop.train(values, run)
  (run / name).unlink()
  assert loop.train(values, run).step == 5


FOREIGN = {
  "config.json": '{"model_type": "llama", "hidden_size": 8}',
  "checkpoints/3/x": "",
  "tokenizer/tokenizer.json": "{}",
  "unfinished.json": '{"command": "convert"}',
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_of_others_is_no_workdir(
  values: config_lib.Config, tmp_path: Path, looker: Looker, name: str
) -> None:
  file = tmp_path / "theirs" / name
  file.parent.mkdir(parents=True)
  file.write_text(FOREIGN[name])
  with pytest.raises(CheckpointError, match=r"--workdir .*theirs: holds .*; name a new"):
    loop.train(values, tmp_path / "theirs")
  assert file.read_text() == FOREIGN[name]
  assert [p for p in (tmp_path / "theirs").rglob("*") if p.is_file()] == [file]


def test_a_file_is_no_workdir(values: config_lib.Config, tmp_path: Path, looker: Looker) -> None:
  (tmp_path / "file").write_text("mine")
  for name in ("file", "file/below"):
    with pytest.raises(CheckpointError, match="file is a file; name a folder"):
      loop.train(values, tmp_path / name)
  assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["link", "link/below"])
def test_a_link_that_leads_nowhere_is_no_workdir(
  values: config_lib.Config, tmp_path: Path, looker: Looker, name: str
) -> None:
  (tmp_path / "link").symlink_to(tmp_path / "gone")
  with pytest.raises(CheckpointError, match="link is a link that leads nowhere"):
    loop.train(values, tmp_path / name)
