"""Folders of tokenizers: saved and opened again, with added tokens, made fast."""

from __future__ import annotations

import json
from pathlib import Path

from llava_sp_jax.data.tokenizer import SETTINGS_FILE, Tokenizer
from tests.data.golden_tokenizers import TEXT_OF_ALL_KINDS


def test_a_folder_saved_is_the_same_tokenizer(
  tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
  for name, tokenizer in tokenizers.items():
    tokenizer.save(tmp_path / name)
    again = Tokenizer(tmp_path / name)
    assert again.spans(TEXT_OF_ALL_KINDS) == tokenizer.spans(TEXT_OF_ALL_KINDS)
    assert (len(again), again.bos_id, again.eos_id) == (
      len(tokenizer),
      tokenizer.bos_id,
      tokenizer.eos_id,
    )
  assert [len(t) for t in tokenizers.values()] == [512, 512, 514]


def test_added_tokens_of_older_and_newer_folders(
  tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
  """`added_tokens.json`, and `added_tokens_decoder` in the settings, name ids of their own."""
  folder = tmp_path / "added"
  tokenizers["legacy_false"].save(folder)
  settings = json.loads((folder / SETTINGS_FILE).read_text())
  settings["added_tokens_decoder"] = {"513": {"content": "<box>"}}
  settings["pad_token"] = {"content": "<pad>"}
  (folder / SETTINGS_FILE).write_text(json.dumps(settings))
  (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 512}))
  tokenizer = Tokenizer(folder)
  assert len(tokenizer) == 514
  assert tokenizer.encode("a<box>b<pad>")[1::2] == (513, 512)


def test_a_fast_tokenizer_with_a_blank_in_front_reads_as_sentencepiece(
  tokenizers: dict[str, Tokenizer], tmp_path: Path
) -> None:
  """A tokenizer.json made from the same model."""
  from transformers import AutoTokenizer

  AutoTokenizer.from_pretrained(str(tokenizers["legacy_false"].path)).save_pretrained(str(tmp_path))
  assert not (tmp_path / "tokenizer.model").exists()
  fast = Tokenizer(tmp_path)
  text = "USER: hello there\nyou"
  assert fast.spans(text) == tokenizers["legacy_false"].spans(text)
