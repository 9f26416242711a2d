"""Tokenizers are written so that llama.cpp reads prompts as training did, or not at all."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax.convert import gguf, gguf_vocabulary
from llava_sp_jax.convert.gguf_tokenizer import BYTE, CONTROL, UNKNOWN, UNUSED, USER_DEFINED
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data.tokenizer import Tokenizer
from tests.data.six_tokenizers import MAKERS, texts

PRE = {"small_bpe": "gpt-2", "llama_3": "dbrx", "qwen2": "qwen2", "legacy": "default",
       "not_legacy": "default"}  # fmt: skip


def made(name: str, folder: Path) -> Path:
  MAKERS[name](folder / name)
  return folder / name


@pytest.mark.parametrize("name", PRE)
def test_texts_are_read_alike(name: str, tmp_path: Path) -> None:
  folder = made(name, tmp_path)
  ours, found = Tokenizer(folder), gguf_vocabulary.of(folder, "v1")
  assert found.pre == PRE[name]
  assert len(found.tokens) == len(found.kinds) == len(ours)
  assert (found.bos, found.ends[0]) == (ours.bos_id, ours.eos_id)
  assert set(found.ends) == set(ours.stop_ids("</s>"))
  read = gguf_vocabulary.READERS[found.model](found)
  for text in list(texts(random.Random(7)))[:20]:
    assert read(text) == list(ours.encode(text))


def test_types_of_sentencepiece_s_tokens(tmp_path: Path) -> None:
  found = gguf_vocabulary.of(made("legacy", tmp_path), "v1")
  kinds = dict(zip(found.tokens, found.kinds, strict=True))
  assert (kinds["<unk>"], kinds["<s>"], kinds["</s>"]) == (UNKNOWN, CONTROL, CONTROL)
  assert kinds["<0x0A>"] == BYTE
  said = found.metadata()
  assert said["ggml.model"] == "llama"
  assert len(said["ggml.scores"]) == len(found.tokens)
  assert said["ggml.add_space_prefix"]


def test_sentencepiece_without_its_model(tmp_path: Path) -> None:
  """A tokenizer.json made of it gives the same tokens, and an equivalent order of merges."""
  from transformers import LlamaTokenizerFast

  folder = made("legacy", tmp_path)
  LlamaTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "json")
  (tmp_path / "json/tokenizer.model").unlink(missing_ok=True)
  one, two = (gguf_vocabulary.of(f, "v1") for f in (folder, tmp_path / "json"))
  assert (one.tokens, one.kinds, one.prefix) == (two.tokens, two.kinds, two.prefix)
  reads = [gguf_vocabulary.READERS["llama"](found) for found in (one, two)]
  for text in list(texts(random.Random(7)))[:20]:
    assert reads[0](text) == reads[1](text)


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
  values = json.loads((folder / "tokenizer.json").read_text())
  edit(values)
  (folder / "tokenizer.json").write_text(json.dumps(values))
  return folder


def word(content: str, number: int, **more: bool) -> dict[str, Any]:
  plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
  return {"id": number, "content": content, **plain, **more}


def test_added_tokens(tmp_path: Path) -> None:
  folder = made("small_bpe", tmp_path)
  count = len(Tokenizer(folder))
  change(folder, lambda v: v["added_tokens"].append(word("<box>", count)))
  found = gguf_vocabulary.of(folder, "v1")
  assert (found.tokens[count:], found.kinds[count:]) == (("<box>",), (USER_DEFINED,))


def test_gaps_between_ids(tmp_path: Path) -> None:
  folder = made("small_bpe", tmp_path)
  count = len(Tokenizer(folder))

  def edit(values: dict[str, Any]) -> None:
    ids = values["model"]["vocab"]
    ids[max(ids, key=ids.__getitem__)] += 2

  found = gguf_vocabulary.of(change(folder, edit), "v1")
  assert found.tokens[count - 1 : count + 1] == (f"[UNUSED_{count - 1}]", f"[UNUSED_{count}]")
  assert found.kinds[count - 1 : count + 1] == (UNUSED, UNUSED)


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
  "spaces": (
    lambda v: v["added_tokens"].append(word("<box>", 399, lstrip=True)),
    r"tokens that take the spaces beside them.*'<box>'",
  ),
  "splits": (
    lambda v: v["pre_tokenizer"].update(add_prefix_space=True),
    r"splits texts in another way.*gpt-2, smollm.*add_prefix_space",
  ),
  "normalizer": (
    lambda v: v.update(normalizer={"type": "Lowercase"}),
    r"splits texts in another way.*Lowercase",
  ),
  "words": (
    lambda v: v.update(model={"type": "WordLevel", "vocab": v["model"]["vocab"], "unk_token": "<unk>"}),
    r"byte-pair encoders only, found WordLevel",
  ),
  "bytes": (
    lambda v: v["model"].update(byte_fallback=True), r"none of sentencepiece's",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_hold(name: str, tmp_path: Path) -> None:
  edit, message = REFUSED[name]
  folder = change(made("small_bpe", tmp_path), edit)
  with pytest.raises(FormatError, match=message):
    gguf_vocabulary.of(folder, "v1")


def test_other_ids_are_refused(tmp_path: Path) -> None:
  """Sentencepiece without its space in front: llama.cpp would put one there."""
  folder = made("not_legacy", tmp_path)
  model = folder / "tokenizer.model"
  model.write_bytes(model.read_bytes() + bytes((0x1A, 2, 0x18, 0)))  # add_dummy_prefix: false
  settings = json.loads((folder / "tokenizer_config.json").read_text())
  (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": True}))
  with pytest.raises(
    FormatError, match=r"reads a prompt of this tokenizer as other ids.*not written"
  ):
    gguf_vocabulary.of(folder, "v1")


@pytest.mark.slow
def test_smollm2_s_tokenizer_is_that_of_llama_cpp(smollm2_file: Path, tmp_path: Path) -> None:
  """The file that llama.cpp's own converter wrote."""
  from llava_sp_jax.convert import gguf_tokenizer

  gguf_tokenizer.write_tokenizer(smollm2_file, tmp_path)
  found = gguf_vocabulary.of(tmp_path, "smollm2").metadata()
  theirs = gguf.open_llama(smollm2_file).values
  for key in ("model", "pre"):
    assert found[f"ggml.{key}"] == theirs[f"tokenizer.ggml.{key}"].decode()
  for key in ("tokens", "merges"):
    assert found[f"ggml.{key}"] == [t.decode() for t in theirs[f"tokenizer.ggml.{key}"]]
  np.testing.assert_array_equal(found["ggml.token_type"], theirs["tokenizer.ggml.token_type"])
  for key in ("eos_token_id", "add_bos_token"):
    assert found[f"ggml.{key}"] == theirs[f"tokenizer.ggml.{key}"]
