"""Runs that were damaged, moved on, or given other inputs: named, and they go on where they can."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax import locks
from llava_sp_jax.checkpoints import on_disk, own_folders
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.training import ledger, loop, resume
from tests.training.looker import Looker, logged

DATA = frozenset({"data"})
# What Orbax had begun to read when it failed may end with an error of its own.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def went_on(folder: Path, looker: Looker, first: int) -> None:
  """The run has ended, and did the steps after `first` again."""
  assert [number for number, *_ in looker.seen] == list(range(first, 5))
  assert logged(folder) == [1, 2, 3, 4, 5]
  assert on_disk.steps(folder)[-1] == 5
  assert ledger.check(folder, 5, 8, range(12)).read == 40


def flip(place: Path) -> None:
  """One bit in the middle of the file that has the values."""
  file = max((place / "d").iterdir(), key=lambda p: p.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1 << 4
  file.write_bytes(content)


# What happens to the checkpoints of a run: (how, the step that must be named).
DAMAGE: dict[str, tuple[Callable[[Path], object], int]] = {
  "a bit of the parameters": (lambda place: flip(place / "3/params"), 3),
  "a bit of the moments": (lambda place: flip(place / "3/optimizer"), 3),
  "a file is gone": (lambda place: (place / "3/params/manifest.ocdbt").unlink(), 3),
  "torn about": (lambda place: (place / "3/about/metadata").write_text('{"fing'), 3),
  "its checksums are gone": (lambda place: shutil.rmtree(place / "3/sums"), 3),
  "a step under another's name": (lambda place: shutil.copytree(place / "3", place / "4"), 4),
  "an empty newer step": (lambda place: (place / "4").mkdir(), 4),
  "a file in its way": (lambda place: (place / "5").write_text(""), 5),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_step_that_cannot_be_read_is_named_and_the_newest_whole_one_is_used(
  run: Path, values: config_lib.Config, looker: Looker, capsys: pytest.CaptureFixture, kind: str
) -> None:
  damage, step = DAMAGE[kind]
  damage(run / "checkpoints")
  assert loop.train(values, run).step == 5
  printed = capsys.readouterr()
  (line,) = (x for x in printed.err.splitlines() if "WARNING" in x)
  assert f"{run}: WARNING: step {step}: " in line
  assert f"kept in {run / 'aside' / str(step)}" in line
  assert (run / "aside" / str(step)).exists()
  assert f"continuing {run} from step {2 if step == 3 else 3}" in printed.out
  went_on(run, looker, 2 if step == 3 else 3)


def test_without_a_step_that_can_be_read_nothing_begins_anew_unasked(
  run: Path, values: config_lib.Config, looker: Looker
) -> None:
  for step in (2, 3):
    flip(run / f"checkpoints/{step}/params")
  with pytest.raises(CheckpointError, match=r"step 2 .*; step 3 .*--from-step 0 trains"):
    loop.train(values, run)
  for step in (2, 3):
    shutil.rmtree(run / f"checkpoints/{step}/params")
  with pytest.raises(CheckpointError, match=r"step 2 .*; step 3 .*--from-step 0 trains"):
    loop.train(values, run)
  assert not looker.seen
  assert loop.train(values, run, options=resume.ResumeOptions(0)).step == 5
  assert sorted(p.name for p in (run / "aside").iterdir()) == ["2", "3"]
  went_on(run, looker, 0)


def test_a_run_goes_back_once_when_asked_and_then_goes_on(
  run: Path, values: config_lib.Config, looker: Looker, capsys: pytest.CaptureFixture
) -> None:
  """The same command after a kill does not go back again."""
  with pytest.raises(CheckpointError, match=r"--from-step 1: it is not there; .*: 2, 3$"):
    loop.train(values, run, options=resume.ResumeOptions(1))
  assert on_disk.steps(run) == [2, 3]
  back = resume.ResumeOptions(2)
  looker.does = lambda number: signal.raise_signal(signal.SIGTERM) if number == 4 else None
  assert loop.train(values, run, options=back).step == 4
  assert on_disk.steps(run) == [2, 4]
  assert f"step 3: training resumes from step 2; it is kept in {run / 'aside/3'}" in (
    capsys.readouterr().err
  )
  looker.does = lambda number: None
  assert loop.train(values, run, options=back).step == 5
  assert f"continuing {run} from step 4" in capsys.readouterr().out
  went_on(run, looker, 2)


def test_other_data_are_refused_with_both_values_unless_they_are_allowed(
  run: Path, values: config_lib.Config, looker: Looker, capsys: pytest.CaptureFixture
) -> None:
  path = Path(values.data.path)
  whole = path.read_text()
  known = resume.about(run, 3)["inputs"]["data"]
  try:
    path.write_text(json.dumps(json.loads(whole)[:9]))
    with pytest.raises(CheckpointError) as error:
      loop.train(values, run)
    assert not looker.seen
    assert "data (data.path) has fingerprint " in str(error.value)
    assert f" here, {known} there. " in str(error.value)
    assert str(error.value).endswith("--allow-changed data")
    assert loop.train(values, run, options=resume.ResumeOptions(changed=DATA)).step == 5
  finally:
    path.write_text(whole)
  assert "data is not what it was until step 3, as allowed" in capsys.readouterr().err
  said = resume.about(run, 5)
  assert [before["data"] for before in said["inputs_before"]] == [known]
  assert said["inputs"]["data"] != known


def test_checkpoints_of_the_time_before_checksums_still_open(
  run: Path, values: config_lib.Config, looker: Looker, capsys: pytest.CaptureFixture
) -> None:
  for step in (2, 3):
    place = run / f"checkpoints/{step}"
    shutil.rmtree(place / "sums")
    note = json.loads((place / "_CHECKPOINT_METADATA").read_text())
    del note["item_handlers"]["sums"]
    (place / "_CHECKPOINT_METADATA").write_text(json.dumps(note))
    about = json.loads((place / "about/metadata").read_text())
    kept = {name: about[name] for name in ("fingerprint", "name", "stage")}
    (place / "about/metadata").write_text(json.dumps(kept))
  assert loop.train(values, run).step == 5
  said = capsys.readouterr().out
  assert "step 3 does not say what data it was trained on" in said
  assert "step 3 was saved without checksums; its values are not verified" in said
  went_on(run, looker, 3)


def test_what_is_being_saved_gets_whole_when_a_step_fails(
  values: config_lib.Config, tmp_path: Path, looker: Looker
) -> None:
  def fail(number: int) -> None:
    if number == 3:
      raise ZeroDivisionError("a step")

  looker.does = fail
  with pytest.raises(ZeroDivisionError):
    loop.train(values, tmp_path / "run")
  assert on_disk.steps(tmp_path / "run") == [2]
  assert not list(tmp_path.rglob("*tmp*"))
  assert not (tmp_path / "run" / locks.FILE).exists()


def test_torn_lines_of_logs_are_told_and_the_run_goes_on(
  run: Path, values: config_lib.Config, looker: Looker, capsys: pytest.CaptureFixture
) -> None:
  for file in (run / "metrics.jsonl", run / ledger.FOLDER / "00000.jsonl"):
    lines = file.read_text().splitlines()
    lines[1] = lines[1][:20]
    file.write_text("\n".join(lines) + "\n")
  assert loop.train(values, run).step == 5
  said = capsys.readouterr().out
  assert "metrics.jsonl: 1 lines could not be read and were dropped" in said
  assert "00000.jsonl: 1 lines could not be read and were dropped" in said
  assert "1 lines could not be read, so this is no proof" in said
  assert logged(run) == [1, 3, 4, 5]


def test_a_damaged_step_is_not_what_a_run_is_opened_with(
  run: Path, capsys: pytest.CaptureFixture
) -> None:
  assert own_folders.open_own(run).step == 3
  flip(run / "checkpoints/3/params")
  assert own_folders.open_own(run).step == 2
  said = capsys.readouterr().err
  assert f"WARNING: {run}: step 3 cannot be used: {run / 'checkpoints/3'}: " in said
  assert "step 2 is used instead" in said
  with pytest.raises(CheckpointError, match="stopped at step 2 of 5; finish it first"):
    own_folders.finished(run, "init.checkpoint")


@pytest.mark.parametrize("step", ["-1", "x", "\u0663", "1.0", "9" * 5000])
def test_a_step_is_a_number_that_a_run_can_have(step: str) -> None:
  with pytest.raises(
    config_lib.ConfigError, match=r"--from-step: expected a step such as 500"
  ) as e:
    resume.ResumeOptions.of(step, "")
  assert len(str(e.value)) < 120


def test_a_start_before_the_first_checkpoint_forgets_what_was_bad(
  values: config_lib.Config, looker: Looker, tmp_path: Path
) -> None:
  """A picture that was missing is there when the same command is given again."""
  folder = Path(values.data.path).parent
  (folder / "more").mkdir(exist_ok=True)
  path = folder / "more" / "captions.json"
  samples = json.loads(Path(values.data.path).read_text())
  path.write_text(json.dumps([{**samples[0], "image": "gone.png"}, *samples[1:]]))
  data = dataclasses.replace(values.data, path=str(path))
  changed = dataclasses.replace(values, data=data)

  def fail(number: int) -> None:
    raise RuntimeError("the power fails")

  looker.does = fail
  with pytest.raises(RuntimeError, match="the power fails"):
    loop.train(changed, tmp_path / "run")
  quarantine = tmp_path / "run" / "quarantine.jsonl"
  assert len(quarantine.read_text().splitlines()) == 1
  path.write_text(json.dumps(samples))
  looker.does = lambda number: None
  assert loop.train(changed, tmp_path / "run").quarantined == 0
  assert not quarantine.exists()
