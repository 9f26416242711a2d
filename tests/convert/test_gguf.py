"""GGUF files: names, the order of rotary rows, sizes, and errors that say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import gguf as ours
from llava_sp_jax.convert import settings
from llava_sp_jax.convert.torch_io import FormatError

gguf: Any = pytest.importorskip("gguf")

WIDTH, HEADS, KV_HEADS, VOCAB, MLP = 8, 2, 1, 5, 16


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
  """llama.cpp's own order of q and k rows, from Hugging Face's (`convert_hf_to_gguf.py`)."""
  rows, columns = weight.shape
  return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


REQUIRED = {
  "embedding_length": WIDTH,
  "block_count": 1,
  "attention.head_count": HEADS,
  "feed_forward_length": MLP,
  "attention.layer_norm_rms_epsilon": 1e-5,
}
OPTIONAL = {
  "vocab_size": VOCAB,
  "attention.head_count_kv": KV_HEADS,
  "context_length": 64,
  "rope.freq_base": 5000.0,
}


def write(
  path: Path,
  architecture: str = "llama",
  extra: str = "",
  metadata: dict[str, Any] | None = None,
  endian: Any = gguf.GGUFEndian.LITTLE,
  divisors: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """A file of one layer; returns its tensors as Hugging Face names and orders them."""
  said = REQUIRED | OPTIONAL if metadata is None else metadata
  kv_heads = said.get("attention.head_count_kv", HEADS)
  rng = np.random.default_rng(0)
  kv = kv_heads * WIDTH // HEADS
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
  writer = gguf.GGUFWriter(path, architecture, endianess=endian)
  add: dict[type, Any] = {
    int: writer.add_uint32,
    float: writer.add_float32,
    bool: writer.add_bool,
    str: writer.add_string,
  }
  for key, value in said.items():
    add[type(value)](f"llama.{key}" if not key.startswith("split.") else key, value)
  result = {}
  for name, (torch_name, shape) in shapes.items():
    array = rng.normal(size=shape).astype(np.float32)
    result[f"{torch_name}.weight"] = array
    heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": kv_heads}.get(name)
    writer.add_tensor(f"{name}.weight", permute(array, heads) if heads else array)
  if extra:
    writer.add_tensor(extra, np.zeros(4, np.float32))
  if divisors is not None:
    writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
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


def test_what_a_file_leaves_out_is_what_the_format_says(tmp_path: Path) -> None:
  write(tmp_path / "x.gguf", metadata=REQUIRED)
  model = settings.language_model(ours.config(tmp_path / "x.gguf"), "x.gguf")
  assert (model.vocab_size, model.kv_heads, model.rope_theta) == (VOCAB, HEADS, 10000.0)
  assert model.max_positions == 2048


@pytest.mark.parametrize("key", REQUIRED)
def test_what_has_no_default_is_named(tmp_path: Path, key: str) -> None:
  write(tmp_path / "x.gguf", metadata={k: v for k, v in (REQUIRED | OPTIONAL).items() if k != key})
  with pytest.raises(FormatError, match=f"x.gguf: without {key}, which every LLaMA has"):
    ours.config(tmp_path / "x.gguf")


def test_positions_are_stretched_as_the_file_says(tmp_path: Path) -> None:
  scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
  for more, wanted in (
    ({}, None),
    ({"rope.scale_linear": 4.0}, 4.0),
    (scaled, 4.0),
    (scaled | {"rope.scaling.type": "none"}, None),
  ):
    write(tmp_path / "x.gguf", metadata=REQUIRED | OPTIONAL | more)
    found = ours.config(tmp_path / "x.gguf").get("rope_scaling", {})
    assert found.get("factor") == wanted


ODD = {
  "another head": ({"rope.dimension_count": 2}, "not supported: rope.dimension_count=2"),
  "experts": ({"expert_count": 8}, "not supported: expert_count=8"),
  "yarn": ({"rope.scaling.type": "yarn"}, "rope.scaling.type: expected one of none, linear"),
  "unknown": ({"attention.magic": 1}, "unknown key attention.magic"),
  "no heads": ({"attention.head_count": 0}, "attention.head_count: expected a whole number"),
  "huge": ({"vocab_size": (1 << 32) - 1}, "vocab_size: expected a whole number from 1"),
  "NaN": ({"rope.freq_base": float("nan")}, "rope.freq_base: expected a number"),
  "a text": ({"context_length": "64"}, "context_length: expected a whole number"),
  "one of several": ({"split.count": 2}, "one part of several"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_odd_metadata_are_refused_by_name(tmp_path: Path, what: str) -> None:
  more, message = ODD[what]
  write(tmp_path / "x.gguf", metadata=REQUIRED | OPTIONAL | more)
  with pytest.raises(FormatError, match=f"x.gguf: {message}"):
    ours.config(tmp_path / "x.gguf")


def test_an_unknown_key_can_be_passed_over(tmp_path: Path) -> None:
  write(tmp_path / "x.gguf", metadata=REQUIRED | OPTIONAL | {"attention.magic": 1})
  assert ours.config(tmp_path / "x.gguf", allow_unknown=True)["vocab_size"] == VOCAB


def test_big_endian_files(tmp_path: Path) -> None:
  wanted = write(tmp_path / "x.gguf", endian=gguf.GGUFEndian.BIG)
  assert (tmp_path / "x.gguf").read_bytes()[4:8] == b"\0\0\0\3"
  for name, tensor in ours.open_gguf(tmp_path / "x.gguf").items():
    np.testing.assert_array_equal(tensor.array(), wanted[name], err_msg=name)


def test_missing_and_broken_files(tmp_path: Path) -> None:
  with pytest.raises(FormatError, match=r"gone.gguf: no such file"):
    ours.open_gguf(tmp_path / "gone.gguf")
  (tmp_path / "text.gguf").write_text("this is no model, but long enough for a header of numbers")
  with pytest.raises(FormatError, match=r"text.gguf: cannot be read as GGUF"):
    ours.open_gguf(tmp_path / "text.gguf")


def test_another_architecture_is_refused(tmp_path: Path) -> None:
  write(tmp_path / "x.gguf", architecture="gemma")
  with pytest.raises(
    FormatError, match="expected the architecture 'llama' or 'qwen2', found 'gemma'"
  ):
    ours.config(tmp_path / "x.gguf")


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
  write(tmp_path / "x.gguf", extra="blk.0.attn_q.bias")
  with pytest.raises(FormatError, match=r"unexpected tensor blk.0.attn_q.bias"):
    ours.open_gguf(tmp_path / "x.gguf")


LLAMA_3 = {
  "rope_type": "llama3",
  "factor": 32.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 8192,
}


def test_divisors_of_llama_3(tmp_path: Path) -> None:
  """vllm-project/vllm#7268, mozilla-ai/llamafile#516: files of Llama 3.1 have a tensor of them."""
  pytest.importorskip("torch")
  from transformers import LlamaConfig
  from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

  head, theta = 16, 500000.0
  config = LlamaConfig(
    hidden_size=HEADS * head,
    num_attention_heads=HEADS,
    rope_parameters={**LLAMA_3, "rope_theta": theta},
  )
  scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
  divisors = theta ** -(np.arange(0, head, 2) / head) / scaled.numpy()
  said = {**REQUIRED, **OPTIONAL, "rope.freq_base": theta, "attention.key_length": head}
  path = tmp_path / "x.gguf"
  write(path, metadata=said, divisors=divisors)
  found = settings.language_model(ours.config(path), str(path)).rope_scaling
  assert found == config_lib.RopeScaling(
    kind="llama3", factor=32.0, low_frequency=1.0, high_frequency=4.0, original_length=8192
  )
  assert "rope" not in "".join(ours.open_gguf(path))
  write(path, metadata=said, divisors=np.ones(head // 2))
  assert settings.language_model(ours.config(path), str(path)).rope_scaling.kind == "default"
  write(path, metadata=said, divisors=divisors + 0.1)
  with pytest.raises(FormatError, match=r"rope_freqs\.weight holds other divisors than Llama 3"):
    ours.config(path)
