"""LLaMA weights and tokenizer from a GGUF file, under Hugging Face's names; dequantised in numpy.

Source: the GGUF specification; llama.cpp's `convert_hf_to_gguf.py` permutes q and k rows, undone here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax.convert.torch_io import FormatError, Tensor, Tensors

NAMES = (
  (r"token_embd\.weight", "model.embed_tokens.weight"),
  (r"output_norm\.weight", "model.norm.weight"),
  (r"output\.weight", "lm_head.weight"),
  (r"blk\.(\d+)\.attn_norm\.weight", r"model.layers.\1.input_layernorm.weight"),
  (r"blk\.(\d+)\.ffn_norm\.weight", r"model.layers.\1.post_attention_layernorm.weight"),
  (r"blk\.(\d+)\.attn_output\.weight", r"model.layers.\1.self_attn.o_proj.weight"),
  (r"blk\.(\d+)\.attn_([qkv])\.weight", r"model.layers.\1.self_attn.\2_proj.weight"),
  (r"blk\.(\d+)\.ffn_(gate|up|down)\.weight", r"model.layers.\1.mlp.\2_proj.weight"),
)


def _open(path: Path) -> Any:
  if not path.is_file():
    raise FormatError(f"{path}: no such file; expected a .gguf of the LLaMA architecture")
  import gguf

  try:
    reader = gguf.GGUFReader(path)
  except (ValueError, OSError) as error:
    raise FormatError(f"{path}: cannot be read as GGUF: {error}") from None
  kind = reader.fields["general.architecture"].contents()
  if kind != "llama":
    raise FormatError(f"{path}: expected the architecture 'llama', found {kind!r}")
  return reader


def open_gguf(path: Path) -> Tensors:
  """Weights in torch's orientation, dequantised to float32 when they are read. Raises: FormatError."""
  import gguf

  reader = _open(path)
  sizes = _config(reader)
  heads = {"q": sizes["num_attention_heads"], "k": sizes["num_key_value_heads"]}
  result: Tensors = {}
  for tensor in reader.tensors:
    name = _name(tensor.name, path)
    projection = re.search(r"\.([qk])_proj\.", name)

    def read(tensor: Any = tensor, projection: Any = projection) -> np.ndarray:
      array = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
      return _unpermute(array, heads[projection.group(1)]) if projection else array

    shape = tuple(int(n) for n in reversed(tensor.shape))  # GGUF counts the fastest axis first
    result[name] = Tensor(name, str(path), shape, np.dtype(np.float32), read)
  return result


def _name(name: str, path: Path) -> str:
  for pattern, target in NAMES:
    if re.fullmatch(pattern, name):
      return re.sub(pattern, target, name)
  raise FormatError(f"{path}: unexpected tensor {name}")


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
  """Rows from llama.cpp's interleaved rotary order back to Hugging Face's half-split order."""
  rows, columns = weight.shape
  return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def config(path: Path) -> dict[str, Any]:
  """What a Hugging Face `config.json` would say. Raises: FormatError."""
  return _config(_open(path))


def _config(reader: Any) -> dict[str, Any]:
  def value(key: str) -> Any:
    return reader.fields[f"llama.{key}"].contents()

  return {
    "model_type": "llama",
    "vocab_size": value("vocab_size"),
    "hidden_size": value("embedding_length"),
    "num_hidden_layers": value("block_count"),
    "num_attention_heads": value("attention.head_count"),
    "num_key_value_heads": value("attention.head_count_kv"),
    "intermediate_size": value("feed_forward_length"),
    "max_position_embeddings": value("context_length"),
    "rope_theta": float(value("rope.freq_base")),
    "rms_norm_eps": round(float(value("attention.layer_norm_rms_epsilon")), 9),
    "tie_word_embeddings": "output.weight" not in {t.name for t in reader.tensors},
  }


def write_tokenizer(path: Path, out: Path) -> None:
  """Rebuilds SmolLM's byte-level BPE from the GGUF's metadata as a Hugging Face folder.

  Raises: FormatError for a pre-tokenizer other than `smollm`.
  """
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  fields = _open(path).fields

  def value(key: str) -> Any:
    return fields[f"tokenizer.ggml.{key}"].contents()

  if value("pre") != "smollm":
    raise FormatError(f"{path}: knows the pre-tokenizer 'smollm', found {value('pre')!r}")
  tokens, control = value("tokens"), 3
  merges = [tuple(m.split(" ")) for m in value("merges")]
  bpe = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, fuse_unk=False)
  tokenizer = Tokenizer(bpe)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
  )
  tokenizer.decoder = decoders.ByteLevel()
  kinds = value("token_type")
  special = [t for t, k in zip(tokens, kinds, strict=True) if k == control]
  tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
  fast = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    bos_token=tokens[value("bos_token_id")],
    eos_token=tokens[value("eos_token_id")],
    unk_token=tokens[value("unknown_token_id")],
  )
  fast.save_pretrained(str(out))
