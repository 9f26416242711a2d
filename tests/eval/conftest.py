"""The tiny trained run as it is loaded, and its engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_sp_jax.infer import pretrained
from llava_sp_jax.infer.engine import Engine
from llava_sp_jax.infer.generation import Generation


@pytest.fixture(scope="session")
def loaded(run_folder: Path) -> pretrained.Pretrained:
  return pretrained.from_run(run_folder)


@pytest.fixture(scope="session")
def engine(loaded: pretrained.Pretrained) -> Engine:
  return Engine(loaded, batch_size=4, generation=Generation(max_new_tokens=4))
