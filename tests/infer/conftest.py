"""A random tiny model and questions about its pictures."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_sp_jax.infer.engine import Request
from llava_sp_jax.infer.pretrained import Pretrained
from tests.conftest import ConfigMaker
from tests.infer.tiny import questions, random_model


@pytest.fixture(scope="session")
def model(tiny_config: ConfigMaker) -> Pretrained:
  return random_model(tiny_config("finetune"))


@pytest.fixture(scope="session")
def asked(tiny_data: Path) -> list[Request]:
  return questions(tiny_data)
