"""The ways that scripts/batch_invariance.py compares fit the engine that it asks."""

from __future__ import annotations

import importlib.util

import pytest

from llava_sp_jax.config import MeshConfig
from llava_sp_jax.infer.layout import EngineLayout
from tests.conftest import REPOSITORY

SPEC = importlib.util.spec_from_file_location(
  "batch_invariance", REPOSITORY / "scripts/batch_invariance.py"
)
assert SPEC
assert SPEC.loader
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


@pytest.mark.parametrize("name", script.WAYS)
def test_a_way_names_what_the_engine_has(name: str) -> None:
  way = dict(script.WAYS[name])
  EngineLayout(**way.pop("layout", {}))  # an unknown name is a TypeError
  MeshConfig(**way.pop("mesh", {}))
  assert way.keys() <= {"batch", "processes", "clients"}
