"""What was written when keys had other names is read as what it says now."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import subprocess
import typing
from pathlib import Path
from types import ModuleType

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax import overrides, recipes
from llava_sp_jax.checkpoints import runs
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.tools import arguments
from tests import documents
from tests.conftest import REPOSITORY, ConfigMaker

RECIPES = (
  "easy_vqa",
  "easy_vqa_smollm2",
  "pretrain",
  "finetune_full",
  "finetune_lora",
  "finetune_qlora",
)
COMMANDS = {  # with what they cannot do without
  "convert": ["in", "out"],
  "inspect": ["in"],
  "merge": ["in", "out"],
  "evaluate": [],
  "export": ["in", "out", "--format=llava"],
  "encode": ["in", "out.pt", "x.png"],
  "generate": ["--checkpoint=x", "--question=y"],
}


def former(config: config_lib.Config) -> dict[str, typing.Any]:
  """The dictionary of a config as it was written before."""
  values = config_lib.to_dict(config)
  values["model"]["projector"]["row"] = values["model"]["projector"].pop("variant")
  return values


def test_every_former_name_leads_to_a_key_and_is_none() -> None:
  assert config_lib.FORMER_NAMES["row"] == "variant"
  for group in config_lib.groups():
    names, fields = overrides.former_names(group), {f.name for f in dataclasses.fields(group)}
    assert set(names.values()) <= fields
    assert not names.keys() & fields


def test_a_config_s_own_former_keys(tiny_config: ConfigMaker) -> None:
  config = tiny_config("finetune", "both")
  assert config_lib.from_json(json.dumps(former(config))) == config
  assert config_lib.from_dict(former(config)) == config
  part = former(config)["model"]
  assert config_lib.from_dict(part, config_lib.ModelConfig) == config.model
  assert '"row"' not in config_lib.to_json(config)
  part["projector"]["variant"] = "none"
  with pytest.raises(
    config_lib.ConfigError, match=r"^config\.projector\.row: the former name of variant, which is"
  ):
    config_lib.from_dict(part, config_lib.ModelConfig)


def test_a_key_that_is_typed() -> None:
  typed = {"config.model.projector.row": "both"}
  assert config_lib.override(config_lib.Config(), typed).model.projector.variant == "both"
  for key in ("config.model.row", "config.model.projector.row.x", "config.row", "config.train.row"):
    with pytest.raises(config_lib.ConfigError, match=r"unknown key|is a value, and has no keys"):
      config_lib.override(config_lib.Config(), {key: "both"})


def test_a_run_goes_on(
  tiny_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(runs, "steps", lambda folder: [1])  # as if it had trained
  (tmp_path / runs.CONFIG_FILE).write_text(json.dumps(former(tiny_config("finetune", "pooling"))))
  runs.check_config(tmp_path, tiny_config("finetune", "pooling"))
  changed = {"projector": {"variant": "both"}}
  with pytest.raises(
    CheckpointError, match=r"config\.model\.projector\.variant: 'both' here, 'pooling' there"
  ):
    runs.check_config(tmp_path, tiny_config("finetune", "pooling", model=changed))


@pytest.mark.parametrize("name", RECIPES)
def test_options_of_recipes(name: str) -> None:
  with documents.stand_ins():
    old, new = (
      recipes.load(
        f"{REPOSITORY}/configs/{name}.py:llm=x,{option}=none"
        if "smol" in name
        else f"{REPOSITORY}/configs/{name}.py:{option}=none"
      )
      for option in ("row", "variant")
    )
  assert old == new
  assert new.model.projector.variant == "none"


def test_a_recipe_s_own_option_is_not_renamed() -> None:
  assert config_lib.parse_arg("row=3", row=1, variant="x").row == 3
  with pytest.raises(config_lib.ConfigError, match=r"unknown option 'row' after ':'; known: size"):
    config_lib.parse_arg("row=3", size=1)


@pytest.mark.parametrize("command", COMMANDS)
def test_flags(command: str) -> None:
  tool: ModuleType = importlib.import_module(f"llava_sp_jax.tools.{command}")
  parser: argparse.ArgumentParser = tool.parser()
  for given in (["--row", "both"], ["--row=both"], ["--variant=both"]):
    assert parser.parse_args([*COMMANDS[command], *given]).variant == "both"
  assert "--row" not in parser.format_help()


def test_a_command_without_the_flag_refuses_its_former_name(
  capsys: pytest.CaptureFixture,
) -> None:
  with pytest.raises(SystemExit):
    arguments.Parser(prog="x").parse_args(["--row=both"])
  assert "unknown --row" in capsys.readouterr().err


def test_options_of_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
  run_easy_vqa = importlib.import_module("run_easy_vqa")
  for flag in ("--row", "--variant"):
    assert run_easy_vqa.parse([flag, "both"]).variant == "both"
    done = subprocess.run(  # told of the next option: this one was taken
      ["bash", "scripts/easy_vqa_smollm2.sh", flag, "both", "--no-such"],
      cwd=REPOSITORY,
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.stderr == "unknown option --no-such; see --help\n"
