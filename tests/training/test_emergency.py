"""Steps on the disk of a host: newer than the run folder's, used if all hosts hold them whole."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import on_disk
from llava_sp_jax.checkpoints.local import Local
from llava_sp_jax.distributed import processes
from llava_sp_jax.training import emergency, ledger, loop
from llava_sp_jax.training.resume import ResumeOptions
from tests.conftest import ConfigMaker
from tests.training.looker import Looker, config, logged


def fail(number: int) -> None:
  if number == 5:
    raise RuntimeError("the power fails")


@pytest.fixture
def made(tiny_config: ConfigMaker, tmp_path: Path) -> config_lib.Config:
  return config(tiny_config, save_every=2, local_folder=str(tmp_path / "disk"), local_every=3)


@pytest.fixture
def failed(made: config_lib.Config, tmp_path: Path, looker: Looker) -> Path:
  """A run that has saved step 2, kept step 3 on the disk, and ended in step 4."""
  looker.does = lambda number: fail(number + 1)
  with pytest.raises(RuntimeError, match="the power fails"):
    loop.train(made, tmp_path / "run")
  looker.seen.clear()
  looker.does = lambda number: None
  return tmp_path / "run"


def kept(tmp_path: Path) -> list[str]:
  return sorted(file.name for file in tmp_path.glob("disk/*/process-0/*"))


def test_a_run_goes_on_from_the_disk(
  made: config_lib.Config,
  failed: Path,
  looker: Looker,
  capsys: pytest.CaptureFixture,
  tmp_path: Path,
) -> None:
  assert on_disk.steps(failed) == [2]
  assert kept(tmp_path) == ["3.json", "3.safetensors"]
  assert loop.train(made, failed).step == 5
  assert [number for number, _, _ in looker.seen] == [3, 4]
  said = capsys.readouterr().out
  assert f"continuing {failed} from step 3, which is on the disks of its hosts" in said
  assert logged(failed) == [1, 2, 3, 4, 5]
  assert ledger.check(failed, 5, 8, range(12)).steps == 5
  assert not list((tmp_path / "disk").iterdir()), "nothing is left of a run that is complete"


def change(file: Path, **values: Any) -> None:
  file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def flip(file: Path) -> None:
  content = bytearray(file.read_bytes())
  content[-100] ^= 1
  file.write_bytes(content)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (flip, "arrays are not what was saved (another checksum)"),
    (lambda file: file.write_bytes(file.read_bytes()[:-9]), "cannot be read as safetensors"),
    (lambda file: file.unlink(), "no such file"),
    (lambda file: change(file.with_suffix(".json"), fingerprint="0123"), "has fingerprint 0123"),
  ],
)
def test_a_damaged_step_is_reported_and_not_used(
  made: config_lib.Config,
  failed: Path,
  looker: Looker,
  capsys: pytest.CaptureFixture,
  tmp_path: Path,
  damage: Any,
  message: str,
) -> None:
  (file,) = tmp_path.glob("disk/*/process-0/3.safetensors")
  damage(file)
  assert loop.train(made, failed).step == 5
  assert [number for number, _, _ in looker.seen] == [2, 3, 4]
  (line,) = capsys.readouterr().err.splitlines()
  assert f"{failed}: WARNING: local step 3 cannot be used" in line
  assert message in line.lower()
  assert logged(failed) == [1, 2, 3, 4, 5]


def test_steps_of_something_else_are_not_used(
  made: config_lib.Config, failed: Path, looker: Looker, tmp_path: Path
) -> None:
  """Of another number of processes, of another config, of a run that is gone; a part of a step."""
  (file,) = tmp_path.glob("disk/*/process-0/3.json")
  local = emergency.open_local(made, failed)
  assert local
  assert emergency.newest(local, made, failed, 2) == (3, made)
  assert emergency.newest(local, made, failed, 3) == (3, made)
  values = json.loads(file.read_text())["config"]
  other = {**values, "train": {**values["train"], "seed": 7}}
  for changed in ({"processes": 2}, {"config": other}, {"step": 4}):
    before = file.read_text()
    change(file, **changed)
    assert emergency.newest(local, made, failed, 2) == (2, made)
    file.write_text(before)
  (failed / emergency.ID_FILE).unlink()
  again = emergency.open_local(made, failed)
  assert again
  assert emergency.newest(again, made, failed, 2) == (2, made)
  file.unlink()
  assert emergency.newest(local, made, failed, 2) == (2, made)


@pytest.mark.parametrize(
  ("theirs", "why"),
  [({}, "process 1 has not"), ({"3": "another start"}, "starts differ"), (None, "")],
)
def test_all_hosts_must_hold_the_step(
  made: config_lib.Config,
  failed: Path,
  looker: Looker,
  capsys: pytest.CaptureFixture,
  monkeypatch: pytest.MonkeyPatch,
  theirs: dict[str, str] | None,
  why: str,
) -> None:
  local = emergency.open_local(made, failed)
  assert local
  other = local.held()[3]["start"] if theirs is None else None
  answer = json.dumps({"3": other} if theirs is None else theirs)
  monkeypatch.setattr(processes, "all_gather", lambda text, name: [text, answer])
  assert emergency.newest(local, made, failed, 2)[0] == (2 if why else 3)
  said = capsys.readouterr().out
  line = f"{failed}: step 3 is not on the disks of all hosts ({why}); step 2 is used\n"
  assert said == (line if why else "")


def test_steps_of_epochs_are_those_of_the_run(
  tiny_config: ConfigMaker, tmp_path: Path, looker: Looker
) -> None:
  """Nothing is in the run folder yet; three steps of two epochs of twelve samples."""
  given: dict[str, Any] = {"epochs": 2.0, "steps": 1000, "local_every": 2, "save_every": 100}
  made = config(tiny_config, local_folder=str(tmp_path / "disk"), **given)
  looker.does = lambda number: fail(number + 2)
  with pytest.raises(RuntimeError, match="the power fails"):
    loop.train(made, tmp_path / "run")
  looker.seen.clear()
  looker.does = lambda number: None
  assert loop.train(made, tmp_path / "run").step == 3
  assert [number for number, _, _ in looker.seen] == [2]


def test_two_steps_stay_and_going_back_removes_them(
  tiny_config: ConfigMaker, tmp_path: Path, looker: Looker, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Also of a slow disk: a run that ends with an error has written what it began to write."""
  write = Local._write

  def slowly(*arguments: Any) -> None:
    time.sleep(0.2)
    write(*arguments)

  monkeypatch.setattr(Local, "_write", slowly)
  given: dict[str, Any] = {"save_every": 100, "local_every": 1, "steps": 9}
  made = config(tiny_config, local_folder=str(tmp_path / "disk"), **given)
  looker.does = lambda number: fail(number)
  with pytest.raises(RuntimeError, match="the power fails"):
    loop.train(made, tmp_path / "run")
  assert kept(tmp_path) == ["3.json", "3.safetensors", "4.json", "4.safetensors"]
  looker.does = lambda number: fail(number + 4)
  with pytest.raises(RuntimeError, match="the power fails"):
    loop.train(made, tmp_path / "run", options=ResumeOptions(0))
  assert kept(tmp_path) == []


def test_a_disk_that_is_full_does_not_end_the_run(
  made: config_lib.Config, tmp_path: Path, looker: Looker, capsys: pytest.CaptureFixture
) -> None:
  (tmp_path / "disk").write_text("a file in place of the folder")
  assert loop.train(made, tmp_path / "run").step == 5
  (line,) = capsys.readouterr().err.splitlines()
  assert "step 3 could not be kept (" in line
  assert "the run goes on, with the checkpoints in its folder" in line


def test_the_bits_are_those_that_were_kept(made: config_lib.Config, failed: Path) -> None:
  local = emergency.open_local(made, failed)
  assert local
  mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  spec = jax.sharding.PartitionSpec("a", None)
  values = np.random.default_rng(0).normal(size=(8, 6))
  tree = {
    "x": jax.device_put(values.astype(np.float32), jax.sharding.NamedSharding(mesh, spec)),
    "y": jax.device_put(values.astype("bfloat16"), jax.sharding.NamedSharding(mesh, spec)),
    "count": jax.device_put(np.int32(3), jax.sharding.NamedSharding(mesh, jax.P())),
  }
  local.save(7, tree, (tree, {"count": tree["count"]}), {"fingerprint": "0"})
  local.wait()
  found, (again, _) = local.read(7, tree, (tree, {"count": tree["count"]}))
  local.verify(7, found, (again, {"count": tree["count"]}))
  for name, leaf in tree.items():
    assert found[name].sharding == leaf.sharding
    assert found[name].dtype == leaf.dtype
    assert np.asarray(found[name]).tobytes() == np.asarray(leaf).tobytes()


def test_a_local_step_needs_no_bucket_that_answers(
  made: config_lib.Config,
  looker: Looker,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
  tmp_path: Path,
) -> None:
  """The ledger cannot be secured for a while: the step is not kept, and training goes on."""
  real = ledger.Ledger.secure

  def secure(book: ledger.Ledger) -> None:
    if len(looker.seen) == 3:
      raise OSError("gs://bucket/run/ledger: no answer")
    real(book)

  monkeypatch.setattr(ledger.Ledger, "secure", secure)
  looker.does = lambda number: fail(number + 1)
  with pytest.raises(RuntimeError, match="the power fails"):
    loop.train(made, tmp_path / "run")
  said = capsys.readouterr().err
  assert "WARNING: process 0: gs://bucket/run/ledger: no answer; step 3 is not kept on" in said
  assert kept(tmp_path) == []
  looker.does = lambda number: None
  assert loop.train(made, tmp_path / "run").step == 5
  assert ledger.check(tmp_path / "run", 5, 8, range(12)).steps == 5


def test_steps_of_another_number_of_processes_are_named(
  made: config_lib.Config,
  failed: Path,
  capsys: pytest.CaptureFixture,
  tmp_path: Path,
) -> None:
  (file,) = tmp_path.glob("disk/*/process-0/3.json")
  change(file, processes=4)
  assert loop.train(made, failed).step == 5
  said = capsys.readouterr().err
  assert "step 3 on the disks of its hosts is of 4 processes, now there are 1; it is not" in said
