"""`convert` opens a tokenizer before it writes: what fails at use is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.checkpoints import tokenizers
from llava_sp_jax.convert import formats
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.data.tokenizer import Tokenizer, TokenizerError
from llava_sp_jax.files import FormatError
from tests.convert.test_formats import GOLDEN, change_json


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """A plain language model with a tokenizer."""
  return Path(shutil.copytree(GOLDEN / "base-llm", tmp_path / "llm"))


def test_a_language_model_s_tokenizer_is_opened(folder: Path) -> None:
  tokenizers.open_tokenizer(formats.open_checkpoint(folder))
  (folder / "tokenizer.model").write_bytes(b"")
  with pytest.raises(TokenizerError, match=f"^{folder}: no tokenizer can be read"):
    tokenizers.open_tokenizer(formats.open_checkpoint(folder))


def with_ids(folder: Path, first: int, special: bool) -> Loaded:
  """With two more tokens, from `first` on."""
  from tokenizers import AddedToken, Tokenizer, models

  words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(first)}, unk_token="w0"))
  new: Any = [AddedToken(text, special=special) for text in ("<a>", "<b>")]
  words.add_special_tokens(new) if special else words.add_tokens(new)
  for name in ("tokenizer.model", "special_tokens_map.json"):
    (folder / name).unlink(missing_ok=True)
  words.save(str(folder / "tokenizer.json"))
  said = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
  (folder / "tokenizer_config.json").write_text(json.dumps(said))
  return formats.open_checkpoint(folder)


def test_words_without_a_row_in_the_embedding(folder: Path) -> None:
  rows = formats.open_checkpoint(folder).config.model.language_model.vocab_size
  with pytest.raises(FormatError, match=f"of {rows + 1} tokens, but the embedding has {rows} rows"):
    tokenizers.open_tokenizer(with_ids(folder, rows - 1, special=False))


def test_special_tokens_without_a_row_are_told(
  folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  rows = formats.open_checkpoint(folder).config.model.language_model.vocab_size
  tokenizers.open_tokenizer(with_ids(folder, rows, special=True))
  assert f"2 special tokens have no row in the embedding of {rows}" in capsys.readouterr().err


def test_code_that_a_folder_brings_is_not_run(folder: Path) -> None:
  change_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
  with pytest.raises(FormatError, match=r"auto_map=.*code that a folder brings is not run"):
    formats.open_checkpoint(folder)


def test_code_that_a_tokenizer_brings_is_not_asked_about(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Named as data.tokenizer, too: transformers would ask a terminal whether it may run."""
  folder = Path(shutil.copytree(GOLDEN / "base-llm", tmp_path / "llm"))
  (folder / "tokenizer.model").unlink()
  (folder / "tokenizer.json").write_text("{}")
  said = {"tokenizer_class": "Novel", "auto_map": {"AutoTokenizer": ["x.Novel", None]}}
  (folder / "tokenizer_config.json").write_text(json.dumps(said))
  (folder / "config.json").unlink()
  asked: list[str] = []
  monkeypatch.setattr("builtins.input", lambda text="": asked.append(text) or "y")
  with pytest.raises(TokenizerError):
    Tokenizer(folder)
  assert not asked
