"""A tokenizer of the hub is named like a folder, for training and for the check of its data."""

from __future__ import annotations

import dataclasses
import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from llava_sp_jax import cli
from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import places
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.training import inputs
from tests.conftest import ConfigMaker
from tests.convert.test_places import hub, keep

__all__ = ["hub"]  # the fixture


def named(config: config_lib.Config, name: str) -> config_lib.Config:
  return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=name))


def test_of_a_repository_only_the_tokenizer_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
  asked: list[str] = []

  def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
    asked.extend(allow_patterns)
    return "/cache"

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  assert places.tokenizer("hf:org/model") == Path("/cache")

  def wanted(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in asked)

  needed = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
  )
  assert all(map(wanted, needed))
  assert not any(map(wanted, ("model.safetensors", "pytorch_model.bin", "config.json")))


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
  ours = inputs.open_tokenizer(here)
  for name in ("org/words", "hf:org/words"):
    assert inputs.open_tokenizer(named(here, name)).fingerprint() == ours.fingerprint()
    assert cli.main(["check", f"--config={recipe}", f"--config.data.tokenizer={name}"]) == 0
  with pytest.raises(FormatError, match=r"org/gone: no such folder, and not fetched from the hub"):
    inputs.open_tokenizer(named(here, "org/gone"))
  assert cli.main(["check", f"--config={recipe}", "--config.data.tokenizer=hf:org/gone"]) == 1
  assert len(capsys.readouterr().err.splitlines()) == 1
