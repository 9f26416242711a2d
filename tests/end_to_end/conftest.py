"""The run that several processes divide, or stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_sp_jax import config as config_lib
from tests.conftest import ConfigMaker
from tests.end_to_end import cluster


@pytest.fixture(scope="module")
def config(tiny_config: ConfigMaker) -> config_lib.Config:
  return tiny_config(
    "finetune",
    "cropping",
    train={"steps": 24, "batch_size": 8},
    optimizer={"learning_rate": 1e-3, "projector_learning_rate": 1e-3},
  )


@pytest.fixture(scope="module")
def config_file(config: config_lib.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The file of `config`, which a module may replace by its own."""
  return cluster.write_config(config, tmp_path_factory.mktemp("config") / "tiny.py")
