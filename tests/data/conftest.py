"""The golden tokenizer under each of its settings."""

from __future__ import annotations

import json
import shutil

import pytest

from llava_sp_jax.data.tokenizer import SETTINGS_FILE, Tokenizer
from tests.data.golden_tokenizers import GOLDEN, SETTINGS


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
  result = {}
  for name, settings in SETTINGS.items():
    folder = tmp_path_factory.mktemp("tokenizers") / name
    folder.mkdir()
    for file in ("tokenizer.model", SETTINGS_FILE, "special_tokens_map.json"):
      shutil.copyfile(GOLDEN / "base-llm" / file, folder / file)
    values = json.loads((folder / SETTINGS_FILE).read_text())
    (folder / SETTINGS_FILE).write_text(json.dumps(values | settings))
    result[name] = Tokenizer(folder)
  return result
