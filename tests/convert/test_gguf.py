"""GGUF files: names, the order of rotary rows, sizes, and errors that say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax.convert import gguf as ours
from llava_sp_jax.convert import settings
from llava_sp_jax.convert.torch_io import FormatError

gguf: Any = pytest.importorskip("gguf")

WIDTH, HEADS, KV_HEADS, VOCAB, MLP = 8, 2, 1, 5, 16


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
  """llama.cpp's own order of q and k rows, from Hugging Face's (`convert_hf_to_gguf.py`)."""
  rows, columns = weight.shape
  return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(path: Path, architecture: str = "llama", extra: str = "") -> dict[str, np.ndarray]:
  """A file of one layer; returns its tensors as Hugging Face names and orders them."""
  rng = np.random.default_rng(0)
  kv = KV_HEADS * WIDTH // HEADS
  block = "model.layers.0."
  shapes = {
    "token_embd": ("model.embed_tokens", (VOCAB, WIDTH)),
    "output_norm": ("model.norm", (WIDTH,)),
    "blk.0.attn_norm": (block + "input_layernorm", (WIDTH,)),
    "blk.0.ffn_norm": (block + "post_attention_layernorm", (WIDTH,)),
    "blk.0.attn_q": (block + "self_attn.q_proj", (WIDTH, WIDTH)),
    "blk.0.attn_k": (block + "self_attn.k_proj", (kv, WIDTH)),
    "blk.0.attn_v": (block + "self_attn.v_proj", (kv, WIDTH)),
    "blk.0.attn_output": (block + "self_attn.o_proj", (WIDTH, WIDTH)),
    "blk.0.ffn_gate": (block + "mlp.gate_proj", (MLP, WIDTH)),
    "blk.0.ffn_up": (block + "mlp.up_proj", (MLP, WIDTH)),
    "blk.0.ffn_down": (block + "mlp.down_proj", (WIDTH, MLP)),
  }
  writer = gguf.GGUFWriter(path, architecture)
  writer.add_vocab_size(VOCAB)
  writer.add_embedding_length(WIDTH)
  writer.add_block_count(1)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_feed_forward_length(MLP)
  writer.add_context_length(64)
  writer.add_rope_freq_base(5000.0)
  writer.add_layer_norm_rms_eps(1e-5)
  result = {}
  for name, (torch_name, shape) in shapes.items():
    array = rng.normal(size=shape).astype(np.float32)
    result[f"{torch_name}.weight"] = array
    heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}.get(name)
    writer.add_tensor(f"{name}.weight", permute(array, heads) if heads else array)
  if extra:
    writer.add_tensor(extra, np.zeros(4, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return result


def test_tensors_come_back_in_hugging_face_s_order(tmp_path: Path) -> None:
  wanted = write(tmp_path / "x.gguf")
  found = {name: t.array() for name, t in ours.open_gguf(tmp_path / "x.gguf").items()}
  for name, tensor in ours.open_gguf(tmp_path / "x.gguf").items():
    assert tensor.shape == found[name].shape
  assert found.keys() == wanted.keys()
  for name, array in wanted.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)
  query = wanted["model.layers.0.self_attn.q_proj.weight"]
  assert not np.array_equal(permute(query, HEADS), query), "the order must matter"


def test_sizes(tmp_path: Path) -> None:
  write(tmp_path / "x.gguf")
  model = settings.language_model(ours.config(tmp_path / "x.gguf"), "x.gguf")
  assert (model.vocab_size, model.width, model.layers) == (VOCAB, WIDTH, 1)
  assert (model.heads, model.kv_heads, model.head_dim) == (HEADS, KV_HEADS, 4)
  assert (model.mlp_width, model.rope_theta, model.norm_eps) == (MLP, 5000.0, 1e-5)
  assert model.tie_embeddings


def test_missing_and_broken_files(tmp_path: Path) -> None:
  with pytest.raises(FormatError, match=r"gone.gguf: no such file; expected a .gguf"):
    ours.open_gguf(tmp_path / "gone.gguf")
  (tmp_path / "text.gguf").write_text("this is no model, but long enough for a header of numbers")
  with pytest.raises(FormatError, match=r"text.gguf: cannot be read as GGUF"):
    ours.open_gguf(tmp_path / "text.gguf")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
  write(tmp_path / "x.gguf", architecture="gemma")
  with pytest.raises(FormatError, match="expected the architecture 'llama', found 'gemma'"):
    ours.config(tmp_path / "x.gguf")


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
  write(tmp_path / "x.gguf", extra="blk.0.attn_q.bias")
  with pytest.raises(FormatError, match=r"unexpected tensor blk.0.attn_q.bias"):
    ours.open_gguf(tmp_path / "x.gguf")
