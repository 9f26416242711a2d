"""What is written for llama.cpp comes back bit-equal, and what it cannot hold is refused by name."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import export, export_gguf, formats, gguf_mmproj, hf_prompts, tables
from llava_sp_jax.convert import gguf as reader
from llava_sp_jax.convert.gguf_file import Container, open_container
from llava_sp_jax.convert.gguf_names import PLAIN, renamed
from llava_sp_jax.convert.leaves import to_tensors
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data import conversation
from llava_sp_jax.data.tokenizer import Tokenizer, train_bpe
from tests.convert.test_round_trip import TEXT, TOWER, source

library: Any = pytest.importorskip("gguf")

PADDED = 5  # rows of the embedding that the tokenizer knows nothing of
QUESTION = "what is the blue shape?"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("bpe")
  train_bpe([f"{QUESTION} USER: ASSISTANT: a circle"] * 3, folder, 300)
  return folder


def model(tokenizer: Path, variant: str = "pooling", dtype: str = "float32", **text: Any) -> Loaded:
  """A random model; its embedding has more rows than its tokenizer has ids."""
  rows = len(Tokenizer(tokenizer)) + PADDED
  decoder = dataclasses.replace(TEXT, vocab_size=rows, **text)
  found = source(variant, dtype, rank=0, language_model=decoder)
  return dataclasses.replace(found, tokenizer=tokenizer)


def contents(path: Path) -> Container:
  return open_container(path, {int(k): v for k, v in library.GGML_QUANT_SIZES.items()})


LLAMA_3 = config_lib.RopeScaling(
  kind="llama3", factor=8.0, low_frequency=1.0, high_frequency=4.0, original_length=8192
)
LINEAR = config_lib.RopeScaling(kind="linear", factor=4.0, original_length=4096)
DECODERS: dict[str, dict[str, Any]] = {
  "llama": {},
  "tied": {"tie_embeddings": True, "rope_theta": 5e5},
  "wide heads": {"head_dim": 8},
  "qwen2": {"attention_bias": True, "norm_eps": 1e-6},
  "linear": {"rope_scaling": LINEAR},
  "llama3": {"rope_scaling": LLAMA_3, "rope_theta": 5e5, "head_dim": 32},
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_come_back(name: str, tokenizer: Path, tmp_path: Path) -> None:
  comes_back(model(tokenizer, **DECODERS[name]), tmp_path / "x")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtypes_come_back(dtype: str, tokenizer: Path, tmp_path: Path) -> None:
  comes_back(model(tokenizer, dtype=dtype), tmp_path / "x")
  kinds = {p.name: p.kind for p in contents(tmp_path / "x/model.gguf").tensors}
  wanted = {"bfloat16": "BF16", "float16": "F16"}[dtype]
  assert kinds["blk.1.attn_q.weight"] == library.GGMLQuantizationType[wanted]
  assert kinds["blk.1.attn_norm.weight"] == library.GGMLQuantizationType.F32


def comes_back(ours: Loaded, out: Path) -> None:
  export.export(ours, "gguf", out)
  back = formats.open_checkpoint(out / "model.gguf")
  text = ours.config.model.language_model
  count = text.vocab_size - PADDED
  assert back.config.model.language_model == dataclasses.replace(text, vocab_size=count)
  wanted = ours.part("language_model")
  assert set(back.leaves) == set(wanted)
  cut = {"token_embed/embedding": np.s_[:count], "lm_head/kernel": np.s_[:, :count]}
  for path, leaf in wanted.items():
    index = cut.get(path.removeprefix("language_model/"), np.s_[:])
    np.testing.assert_array_equal(
      back.leaves[path].read(), leaf.read()[index].astype(np.float32), err_msg=path
    )


def test_a_window_limits_the_context(tokenizer: Path, tmp_path: Path) -> None:
  """llama.cpp attends to everything; within the window that is the same."""
  export.export(model(tokenizer, sliding_window=64), "gguf", tmp_path / "x")
  found = reader.config(tmp_path / "x/model.gguf")
  assert found["model_type"] == "llama"
  assert found["max_position_embeddings"] == 64


def test_the_tokenizer_comes_back(tokenizer: Path, tmp_path: Path) -> None:
  from llava_sp_jax.convert import gguf_tokenizer

  export.export(model(tokenizer), "gguf", tmp_path / "x")
  gguf_tokenizer.write_tokenizer(tmp_path / "x/model.gguf", tmp_path / "back")
  ours, back = Tokenizer(tokenizer), Tokenizer(tmp_path / "back")
  assert (back.bos_id, back.eos_id, back.special_ids) == (
    ours.bos_id,
    ours.eos_id,
    ours.special_ids,
  )
  for text in (QUESTION, "</s>USER: 3.14 naïve <s>", "\n\n  blanks 日本語🙂"):
    assert back.encode(text) == ours.encode(text)


def values_of(container: Container, name: str) -> np.ndarray:
  place = next(p for p in container.tensors if p.name == name)
  dtype = PLAIN[library.GGMLQuantizationType(place.kind).name]
  count = place.size // dtype.itemsize
  return container.file.map(dtype, place.start, count).reshape(place.shape)


@pytest.mark.parametrize(("tower", "dtype"), [("clip", "bfloat16"), ("siglip", "float32")])
def test_tower_and_projector_are_written_whole(
  tower: str, dtype: str, tokenizer: Path, tmp_path: Path
) -> None:
  sizes = dataclasses.replace(TOWER, variant=tower, layers=3, select_layer=-2)
  found = source(
    "none", dtype, rank=0, tower=sizes, language_model=model(tokenizer).config.model.language_model
  )
  ours = dataclasses.replace(found, tokenizer=tokenizer)
  export.export(ours, "gguf", tmp_path / "x")
  container = contents(tmp_path / "x/mmproj.gguf")
  said = container.values
  assert said["clip.projector_type"] == b"mlp"
  assert said["clip.vision.block_count"] == 2
  assert said["clip.vision.feature_layer"].tolist() == [2]
  assert said["clip.use_gelu"] is (tower == "siglip")
  assert np.allclose(said["clip.vision.image_mean"], ours.config.data.image_mean)
  rows = to_tensors(ours.part("vision_tower"), tables.TOWERS[tower])
  rows += to_tensors(ours.part("projector"), export._projector_names(ours))
  names = {renamed(t.name, gguf_mmproj.NAMES, back=True): t for t in rows}
  assert set(names) == {p.name for p in container.tensors}
  for name, tensor in names.items():
    assert name is not None
    stored = values_of(container, name)
    exact = stored.ndim == 1 or name in gguf_mmproj.EXACT
    assert stored.dtype == (np.float32 if exact else tensor.dtype), name
    np.testing.assert_array_equal(stored, tensor.array().astype(stored.dtype), err_msg=name)
  last = tmp_path / "x" / gguf_mmproj.CLASS_LAST
  assert last.exists() == (tower == "clip")
  if last.exists():
    moved = "v.position_embd.weight"
    one, two = (values_of(c, moved) for c in (container, contents(last)))
    np.testing.assert_array_equal(two, [*one[1:], one[0]])
    for name in {p.name for p in container.tensors} - {moved}:
      np.testing.assert_array_equal(values_of(container, name), values_of(contents(last), name))


def test_only_llava_gets_a_file_of_the_tower(tokenizer: Path, tmp_path: Path) -> None:
  spatial, plain = model(tokenizer), model(tokenizer, "none")
  export.export(spatial, "gguf", tmp_path / "x")
  assert [p.name for p in (tmp_path / "x").iterdir()] == ["model.gguf"]
  assert "no spatial tokens (variant pooling)" in export_gguf.note(spatial)
  assert "llava-sp encode" in export_gguf.note(spatial)
  assert "after it resizes them, and has CLIP's class token" in export_gguf.note(plain)


DATA: dict[str, tuple[dict[str, Any], str]] = {
  "tiles": ({"image_aspect": "anyres"}, "tiles (anyres)"),
  "filter": ({"image_resample": "bilinear"}, "not with bilinear ones"),
  "crop": ({"image_aspect": "square"}, "training did not"),
  "color": ({"image_mean": (0.5, 0.5, 0.5)}, "not (127, 127, 127)"),
}


@pytest.mark.parametrize("name", DATA)
def test_other_pictures_are_named(name: str, tokenizer: Path) -> None:
  changes, message = DATA[name]
  found = model(tokenizer, "none")
  data = dataclasses.replace(found.config.data, **changes)
  config = dataclasses.replace(found.config, data=data)
  assert message in export_gguf.note(dataclasses.replace(found, config=config))


@pytest.mark.parametrize("name", ["v1", "smollm2", "v1_mmtag", "llama_2"])
@pytest.mark.parametrize("kind", hf_prompts.LLAMA_CPP)
def test_the_chat_template_writes_prompts_of_training(name: str, kind: str) -> None:
  jinja2 = pytest.importorskip("jinja2")
  template = conversation.TEMPLATES[name]
  mark = "data:image/png;base64,AAAA"
  part = {"media_marker": {"text": mark}, "image_url": {"image_url": {"url": mark}}}[kind]
  content = [{"type": kind, **part}, {"type": "text", "text": QUESTION}]
  messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
  messages += [{"role": "assistant", "content": "a circle"}, {"role": "user", "content": "And?"}]
  text = hf_prompts.chat_template(template, pictures=hf_prompts.LLAMA_CPP)
  found = jinja2.Template(text, keep_trailing_newline=True).render(messages=messages)
  pieces = conversation.prompt("And?", template, 1, [(QUESTION, "a circle")])
  assert found == "".join(p.text for p in pieces).replace("<image>", mark)


def test_what_llama_cpp_does_not_compute(tokenizer: Path, tmp_path: Path) -> None:
  yarn = config_lib.RopeScaling(kind="yarn", factor=4.0, original_length=64)
  few = model(tokenizer)
  text = dataclasses.replace(few.config.model.language_model, vocab_size=8)
  small = dataclasses.replace(source("pooling", rank=0, language_model=text), tokenizer=tokenizer)
  for wrong, message in (
    (model(tokenizer, rope_scaling=yarn), r"positions scaled as 'yarn'.*default, linear, llama3"),
    (source("pooling", rank=0), "has no tokenizer"),
    (small, r"ids, but the embedding has 8 rows"),
  ):
    with pytest.raises(FormatError, match=message):
      export.export(wrong, "gguf", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_package_that_writes_is_named(
  tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setitem(sys.modules, "gguf", None)
  with pytest.raises(FormatError, match=r"with the package gguf; pip install"):
    export.export(model(tokenizer), "gguf", tmp_path / "x")
