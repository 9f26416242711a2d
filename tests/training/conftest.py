"""A step that only looks in place of the compiled one, and a run that was stopped."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from pathlib import Path

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax import locks
from llava_sp_jax.checkpoints import on_disk
from llava_sp_jax.training import loop
from llava_sp_jax.training import run as run_lib
from tests.conftest import ConfigMaker
from tests.training.looker import Looker, config


@pytest.fixture
def looker(monkeypatch: pytest.MonkeyPatch) -> Looker:
  made = Looker()
  monkeypatch.setattr(run_lib, "compile_step", lambda *_: made)
  return made


@pytest.fixture(scope="session")
def values(tiny_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> config_lib.Config:
  """Of a run on a copy of the tiny data, which a test may edit."""
  made = config(tiny_config)
  copy = tmp_path_factory.mktemp("data") / "captions.json"
  shutil.copy(made.data.path, copy)
  return dataclasses.replace(made, data=dataclasses.replace(made.data, path=str(copy)))


@pytest.fixture(scope="session")
def stopped(values: config_lib.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run of five steps that was stopped after the third; steps 2 and 3 are saved."""
  folder, made = tmp_path_factory.mktemp("stopped") / "run", Looker()
  made.does = lambda number: signal.raise_signal(signal.SIGTERM) if number == 3 else None
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_lib, "compile_step", lambda *_: made)
    assert loop.train(values, folder).step == 3
  assert on_disk.steps(folder) == [2, 3]
  assert {p.name for p in folder.iterdir()} >= {"checkpoints", "config.json", "tokenizer"}
  assert not (folder / locks.FILE).exists()
  return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
  return Path(shutil.copytree(stopped, tmp_path / "run"))
