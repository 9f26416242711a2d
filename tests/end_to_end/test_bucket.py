"""A run in a bucket is the run on a disk, to the bit; what it left there is read from there."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import cli, locks, storage
from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import on_disk, own_folders, runs
from llava_sp_jax.results import predictions
from llava_sp_jax.training import ledger, loop, resume
from tests.conftest import ConfigMaker
from tests.end_to_end import test_resume as killing
from tests.end_to_end.cluster import metrics, saved, write_config
from tests.end_to_end.kill_trials import numbers

pytestmark = pytest.mark.guard
STEPS = 4


@pytest.fixture(scope="module")
def config(tiny_config: ConfigMaker) -> config_lib.Config:
  return tiny_config("finetune", "cropping", train={"steps": STEPS, "save_every": 2})


@pytest.fixture(scope="module")
def both(
  config: config_lib.Config, bucket: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
  """The same run on a disk and in a bucket."""
  found = {"disk": tmp_path_factory.mktemp("disk") / "run", "bucket": storage.place(bucket) / "run"}
  for folder in found.values():
    assert loop.train(config, str(folder)).step == STEPS
  return found


def sums(folder: Path, step: int) -> dict[str, dict[str, int]]:
  return on_disk.checksums(folder / on_disk.PLACE / str(step))


def names(folder: Path) -> set[str]:
  return {path.name for path in folder.iterdir()}


def test_it_is_the_run_on_a_disk(both: dict[str, Path]) -> None:
  here, there = both["disk"], both["bucket"]
  assert numbers(here) == numbers(there)
  assert ledger.read(here) == ledger.read(there)
  assert saved(here) == saved(there) == [2, 4]
  assert sums(here, 4) == sums(there, 4) != {}
  assert names(here) == names(there)  # and no lock
  assert (here / "config.json").read_bytes() == (there / "config.json").read_bytes()
  killing.same_parameters(here, there)


@pytest.mark.slow
def test_an_older_step_and_what_a_killed_save_left(
  both: dict[str, Path], config: config_lib.Config
) -> None:
  """Newer steps are kept aside; the unfinished one is removed. The end is the same again."""
  there = both["bucket"]
  store = storage.of(there)
  before = numbers(there)
  for path in ("params/d/half", "about/metadata"):
    store.put(there / on_disk.PLACE / "3" / path, b"{}")
  assert on_disk.steps(there) == [2, 4]
  assert not on_disk.damaged(there)
  options = resume.ResumeOptions(step=2)
  assert loop.train(config, str(there), options=options).step == STEPS
  assert not on_disk.unfinished(there)
  assert names(there / resume.ASIDE) == {"4"}
  assert numbers(there) == before
  assert sums(there, 4) == sums(both["disk"], 4)


def test_a_damaged_step_is_set_aside(both: dict[str, Path], bucket: str) -> None:
  there = storage.place(bucket) / "damaged"
  for step in on_disk.steps(both["bucket"]):
    local = storage.of(there).local(both["bucket"] / on_disk.PLACE / str(step))
    storage.of(there).upload(local, there / on_disk.PLACE / str(step))
  storage.of(there).put(there / on_disk.PLACE / "4" / "about" / "metadata", b"torn")
  assert list(on_disk.damaged(there)) == [4]
  resume.set_newer_aside(there, 2)
  assert on_disk.steps(there) == [2]
  assert (there / resume.ASIDE / "4" / on_disk.MARKER).is_file()


def test_commands_read_it(
  both: dict[str, Path], bucket: str, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  there = str(both["bucket"])
  assert not cli.main(["inspect", there])
  assert "fingerprint" in capsys.readouterr().out
  picture = next(tiny_data.rglob("*.png"))
  asked = ["--image", str(picture), "--question", "what?", "--max-new-tokens", "3"]
  answers = []
  for folder in both.values():
    assert not cli.main(["generate", "--checkpoint", str(folder), *asked])
    answers.append(capsys.readouterr().out)
  assert answers[0] == answers[1] != ""
  merged = f"{bucket}/merged"
  assert not cli.main(["merge", there, merged])
  assert own_folders.open_own(merged).about["stage"] == "convert"
  assert not on_disk.unfinished(storage.place(merged))


@pytest.mark.slow
def test_results_are_written_beside_it(
  both: dict[str, Path], tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  """A second call asks nothing again, and the results of both places compare."""
  outs = {kind: folder / "eval-easy_vqa" for kind, folder in both.items()}
  asked = ["eval", "--task=easy_vqa", f"--data={tiny_data}", "--limit=3"]
  for kind, folder in both.items():
    assert cli.main([*asked, f"--checkpoint={folder}"]) == 0
    assert f"written: {outs[kind]}/predictions.jsonl" in capsys.readouterr().out
  assert predictions.read(outs["disk"]) == predictions.read(outs["bucket"]) != {}
  assert names(outs["disk"]) == names(outs["bucket"])
  assert cli.main([*asked, f"--checkpoint={both['bucket']}"]) == 0
  assert f"{outs['bucket']}: 3 questions are answered already" in capsys.readouterr().out
  merge = ["--merge", f"--out={outs['bucket']}", f"--compare={outs['disk']}"]
  assert cli.main([*asked, *merge]) == 0
  assert "0 fixed, 0 broken, 0 in other words" in " ".join(capsys.readouterr().out.split())


def test_a_part_is_written_by_one_process(bucket: str, tmp_path: Path) -> None:
  folder = storage.place(bucket) / tmp_path.name
  record = {"id": "a", "error": ""}
  with predictions.PredictionWriter(folder, predictions.Part()) as writer:
    with pytest.raises(locks.LockError, match="in use by llava-sp eval"):
      predictions.PredictionWriter(folder, predictions.Part())
    predictions.PredictionWriter(folder, predictions.Part(1, 2)).__exit__(None, None, None)
    writer.write(record)
  assert names(folder) == {"predictions.jsonl"}


@pytest.mark.slow
def test_the_next_stage_starts_from_it(
  tiny_config: ConfigMaker, bucket: str, tmp_path: Path
) -> None:
  first = tiny_config("pretrain_all", "cropping", train={"steps": 1})
  loop.train(first, f"{bucket}/one")
  changes: dict[str, Any] = {"train": {"steps": 2}, "init": {"checkpoint": f"{bucket}/one"}}
  second = tiny_config("finetune", "cropping", **changes)
  loop.train(second, tmp_path / "two")
  same = own_folders.open_own(tmp_path / "two").params()
  before = own_folders.open_own(f"{bucket}/one").params()
  assert all((same[p] == before[p]).all() for p in before if p.startswith("vision_tower/"))


def test_a_contradiction_and_a_file_are_refused(
  both: dict[str, Path], config: config_lib.Config, bucket: str
) -> None:
  other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, b2=0.5))
  with pytest.raises(runs.CheckpointError, match=r"config.optimizer.b2: 0.5 here"):
    loop.train(other, str(both["bucket"]))
  assert not (both["bucket"] / "lock.json").exists()


def test_killed_in_the_middle_of_a_save(
  tiny_config: ConfigMaker, bucket: str, tmp_path: Path
) -> None:
  """A process dies while it saves; the next one takes the lock over and ends as on a disk."""
  config = tiny_config("finetune", "cropping", train={"steps": 9, "save_every": 3})
  file = write_config(config, tmp_path / "tiny.py")
  killing.finish(file, tmp_path / "disk")
  there = storage.place(bucket) / tmp_path.name
  process = killing.start(file, there)
  assert killing.wait_for(process, lambda: len(saved(there)) and on_disk.unfinished(there), 0.002)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  assert (there / "lock.json").exists()
  assert metrics(there)[-1]["step"] >= saved(there)[-1]
  before = saved(there)[-1]
  assert f"continuing {there} from step {before}" in killing.finish(file, there)
  assert numbers(there) == numbers(tmp_path / "disk")
  assert ledger.read(there) == ledger.read(tmp_path / "disk")
  assert sums(there, 9) == sums(tmp_path / "disk", 9)
