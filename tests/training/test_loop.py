"""The loop around a step that only looks: what it is given, what is saved, how a run goes on."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import jax
import pytest

from llava_sp_jax.checkpoints import fingerprints, manager, on_disk, runs
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.training import ledger, loop
from llava_sp_jax.training import run as run_lib
from tests.conftest import ConfigMaker
from tests.training.looker import Looker, config, logged


@pytest.fixture
def looker(monkeypatch: pytest.MonkeyPatch) -> Looker:
  made = Looker()
  monkeypatch.setattr(run_lib, "compile_step", lambda *_: made)
  return made


@pytest.mark.parametrize("seed", [0, 3])
def test_the_key_of_dropout_is_the_run_s_seed(
  tiny_config: ConfigMaker, tmp_path: Path, looker: Looker, seed: int
) -> None:
  loop.train(config(tiny_config, seed=seed, steps=2), tmp_path / "run")
  wanted = jax.random.key_data(jax.random.key(seed)).tolist()
  assert [key for _, key, _ in looker.seen] == [wanted] * 2


def test_a_run_that_was_stopped_goes_on_like_one_that_was_not(
  tiny_config: ConfigMaker, tmp_path: Path, looker: Looker
) -> None:
  """The same steps see the same batches; nothing is logged, saved or read twice."""
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  assert loop.train(config(tiny_config), whole).step == 5
  assert on_disk.steps(whole) == [2, 4, 5]
  wanted, looker.seen = looker.seen, []
  assert [number for number, *_ in wanted] == [0, 1, 2, 3, 4]
  assert len({str(tokens) for *_, tokens in wanted}) == 5
  looker.does = lambda number: signal.raise_signal(signal.SIGTERM) if number == 3 else None
  assert loop.train(config(tiny_config), parts).step == 3
  assert on_disk.steps(parts) == [2, 3]
  for file in (parts / "metrics.jsonl", parts / ledger.FOLDER / "00000.jsonl"):
    lines = file.read_text().splitlines()
    again = json.dumps({**json.loads(lines[-1]), "step": 4})  # of a step that was not saved
    file.write_text("\n".join([*lines, again]) + "\n")
  looker.does = lambda number: None
  assert loop.train(config(tiny_config), parts).step == 5
  assert looker.seen == wanted
  assert on_disk.steps(parts) == [2, 3, 4, 5]
  assert logged(whole) == logged(parts) == [1, 2, 3, 4, 5]
  strip = [{k: v for k, v in line.items() if k != "time"} for line in ledger.read(parts)]
  assert strip == ledger.read(whole)
  assert runs.saved(parts)[2] == 5
  assert (parts / "config.json").read_text() == (whole / "config.json").read_text()


def test_nothing_is_written_between_the_records_that_are_asked_for(
  tiny_config: ConfigMaker, tmp_path: Path, looker: Looker
) -> None:
  loop.train(config(tiny_config, log_every=2, save_every=100), tmp_path / "run")
  assert logged(tmp_path / "run") == [2, 4, 5]
  assert on_disk.steps(tmp_path / "run") == [5]


def test_another_base_is_refused_before_a_step(
  tiny_config: ConfigMaker, tmp_path: Path, looker: Looker, monkeypatch: pytest.MonkeyPatch
) -> None:
  """As when the folder that config.init names was replaced; only the newest checkpoints are kept."""
  folder = tmp_path / "run"
  loop.train(config(tiny_config, save_every=1, keep=2), folder)
  assert on_disk.steps(folder) == [4, 5]
  known = runs.saved(folder)[1]
  assert (known["stage"], known["name"]) == ("pretrain", "tiny-none-pretrain")
  looker.seen.clear()
  monkeypatch.setattr(fingerprints, "fingerprint", lambda tree: "another")
  with pytest.raises(CheckpointError, match=rf"{known['fingerprint']}, .* has another;"):
    loop.train(config(tiny_config, save_every=1, keep=2), folder)
  assert not looker.seen


def test_a_signal_while_the_last_step_is_written_does_not_stop_the_write(
  tiny_config: ConfigMaker, tmp_path: Path, looker: Looker, monkeypatch: pytest.MonkeyPatch
) -> None:
  close = manager.Checkpoints.close

  def interrupted(checkpoints: manager.Checkpoints) -> None:
    if not checkpoints._closed:
      signal.raise_signal(signal.SIGINT)
    close(checkpoints)

  monkeypatch.setattr(manager.Checkpoints, "close", interrupted)
  assert loop.train(config(tiny_config), tmp_path / "run").step == 5
  assert on_disk.steps(tmp_path / "run")[-1] == 5


def test_epochs_give_the_steps(tiny_config: ConfigMaker, tmp_path: Path, looker: Looker) -> None:
  """Twelve samples in batches of eight: three steps of two epochs, for a resumed run as well."""
  run, made = tmp_path / "run", config(tiny_config, epochs=2.0, steps=1000)
  looker.does = lambda number: signal.raise_signal(signal.SIGTERM) if number == 2 else None
  stopped = loop.train(made, run)
  assert (stopped.step, stopped.steps) == (2, 3)
  assert runs.read_config(run).train.steps == 3
  looker.does = lambda number: None
  assert loop.train(made, run).step == 3
  assert on_disk.steps(run)[-1] == 3
  with pytest.raises(CheckpointError, match=r"train.epochs: 1.0 here, 2.0 there"):
    loop.train(config(tiny_config, epochs=1.0, steps=1000), run)
