"""Every recipe of configs/ with every option that it documents."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import conversation
from llava_sp_jax.models import build
from llava_sp_jax.training import optimizer
from tests import documents
from tests.conftest import REPOSITORY
from tests.every_variant import leaves

CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))


def load_config(path: Path) -> ModuleType:
  spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
  assert spec
  assert spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def documented_options(path: Path) -> list[str]:
  """Each option of a config's docstring: `variant=a|b` gives each value, `seed=0` gives itself."""
  text = (load_config(path).__doc__ or "").partition("Options after the colon")[2]
  result = []
  for key, values in re.findall(r"(\w+)=(<[^>]*>|[\w.|/-]+)", text):
    if not values.startswith("<"):
      result += [f"{key}={value}" for value in values.rstrip(".").split("|")]
  return result


# Options that a recipe cannot do without.
NEEDED = {"finetune": "init=CKPT,data=FILE,"}
CASES = [(path, option) for path in CONFIGS for option in ["", *documented_options(path)]]


@pytest.mark.parametrize(("path", "option"), CASES, ids=[f"{p.stem}:{o}" for p, o in CASES])
def test_every_config_validates_and_builds(path: Path, option: str) -> None:
  with documents.stand_ins():
    made = load_config(path).get_config(NEEDED.get(path.stem, "") + option)
  config = config_lib.from_dict(made.to_dict())
  shapes = leaves(config.model)
  assert config_lib.from_json(config_lib.to_json(config)) == config
  assert config.data.template in conversation.TEMPLATES
  assert config.data.turns in conversation.TURNS
  assert config.data.row_length > build.image_token_count(config.model)
  learning = [p for p in shapes if optimizer.group_of(p, config.optimizer.stage) != "frozen"]
  assert learning


@pytest.mark.parametrize("path", CONFIGS, ids=[p.stem for p in CONFIGS])
def test_every_config_opens_with_its_command_and_refuses_unknown_options(path: Path) -> None:
  module = load_config(path)
  assert f"--config configs/{path.name}" in (module.__doc__ or "").partition("\n\n")[0]
  with pytest.raises(config_lib.ConfigError, match=r"unknown option 'colour' after ':'; known: "):
    module.get_config("colour=red")
