"""A tokenizer of the hub is named like a folder, for training and for the check of its data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llava_sp_jax import cli
from llava_sp_jax import config as config_lib
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.train import loop
from tests.conftest import ConfigMaker
from tests.convert.test_places import hub, keep

__all__ = ["hub"]  # the fixture


def named(config: config_lib.Config, name: str) -> config_lib.Config:
  return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=name))


def test_a_name_of_the_hub_is_a_tokenizer(
  hub: Path, tiny_config: ConfigMaker, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  here = tiny_config()
  keep(hub, "org/words", Path(here.data.tokenizer))
  recipe = tmp_path / "recipe.py"
  recipe.write_text(
    f"from ml_collections import ConfigDict\n\ndef get_config():\n"
    f"  return ConfigDict({config_lib.to_dict(here)!r})\n"
  )
  ours = loop.open_tokenizer(here)
  for name in ("org/words", "hf:org/words"):
    assert loop.open_tokenizer(named(here, name)).fingerprint() == ours.fingerprint()
    assert cli.main(["check", f"--config={recipe}", f"--config.data.tokenizer={name}"]) == 0
  with pytest.raises(FormatError, match=r"org/gone: no such folder, and not fetched from the hub"):
    loop.open_tokenizer(named(here, "org/gone"))
  assert cli.main(["check", f"--config={recipe}", "--config.data.tokenizer=hf:org/gone"]) == 1
  assert len(capsys.readouterr().err.splitlines()) == 1
