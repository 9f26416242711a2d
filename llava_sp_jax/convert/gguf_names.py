"""Maps names, settings and layouts of GGUF files to Hugging Face's and back, for reader and writer.

Sources: the GGUF specification; llama.cpp's `convert_hf_to_gguf.py` for the order of rotary rows.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from llava_sp_jax.convert import keys
from llava_sp_jax.convert.keys import LAYERS, POSITIVE, SIZE
from llava_sp_jax.convert.tensor import BFLOAT16

Names = tuple[tuple[str, str], ...]  # (name in the file, Hugging Face's); `{layer}` is in both

_BLOCK, _LAYER = "blk.{layer}", "model.layers.{layer}"
DECODER: Names = (
  ("token_embd.weight", "model.embed_tokens.weight"),
  ("output_norm.weight", "model.norm.weight"),
  ("output.weight", "lm_head.weight"),
  (f"{_BLOCK}.attn_norm.weight", f"{_LAYER}.input_layernorm.weight"),
  (f"{_BLOCK}.ffn_norm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
  (f"{_BLOCK}.attn_output.weight", f"{_LAYER}.self_attn.o_proj.weight"),
  *((f"{_BLOCK}.attn_{p}.weight", f"{_LAYER}.self_attn.{p}_proj.weight") for p in "qkv"),
  *((f"{_BLOCK}.ffn_{p}.weight", f"{_LAYER}.mlp.{p}_proj.weight") for p in ("gate", "up", "down")),
)
_BIASES: Names = tuple(
  (f"{_BLOCK}.attn_{p}.bias", f"{_LAYER}.self_attn.{p}_proj.bias") for p in "qkv"
)
EMBEDDING = "token_embd.weight"
DIVISORS = "rope_freqs.weight"  # divisors of rotary frequencies, since Llama 3.1


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Describes a decoder of llama.cpp.

  `interleaved` says whether the rows of q and k are in the order of interleaved rotary pairs.
  """

  names: Names
  interleaved: bool


ARCHITECTURES = {  # by `general.architecture`, which is also Hugging Face's `model_type`
  "llama": Architecture(DECODER, True),
  "qwen2": Architecture(DECODER + _BIASES, False),
}

# Names in config.json -> (key in the file, kind of its value).
SETTINGS = {
  "hidden_size": ("embedding_length", SIZE),
  "num_hidden_layers": ("block_count", LAYERS),
  "num_attention_heads": ("attention.head_count", SIZE),
  "intermediate_size": ("feed_forward_length", SIZE),
  "rms_norm_eps": ("attention.layer_norm_rms_epsilon", keys.real(0.0, 1.0)),
  "vocab_size": ("vocab_size", SIZE),
  "num_key_value_heads": ("attention.head_count_kv", SIZE),
  "max_position_embeddings": ("context_length", SIZE),
  "rope_theta": ("rope.freq_base", POSITIVE),
  "head_dim": ("attention.key_length", SIZE),
}
WIDTHS = ("attention.value_length", "rope.dimension_count")  # keys that repeat a head's width

PLAIN = {  # types of ggml whose values are numbers, not codes
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": BFLOAT16,
}


def renamed(name: str, names: Names, *, back: bool = False) -> str | None:
  """Returns Hugging Face's name of a tensor, or with `back` the one in the file; None if unknown."""
  for row in names:
    given, wanted = reversed(row) if back else row
    pattern = re.escape(given).replace(r"\{layer\}", r"(?P<layer>\d+)")
    if found := re.fullmatch(pattern, name):
      return wanted.format(**found.groupdict())
  return None


def head_count(name: str, heads: int, kv_heads: int) -> int:
  """Returns how many heads the rows of a tensor of Hugging Face's name are; 0 unless of q or k."""
  found = re.search(r"\.([qk])_proj\.", name)
  return {"q": heads, "k": kv_heads}[found[1]] if found else 0


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
  """Reorders rows from Hugging Face's half-split to llama.cpp's interleaved rotary order."""
  rows, columns = weight.shape
  return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def half_split(weight: np.ndarray, heads: int) -> np.ndarray:
  """Reorders rows from llama.cpp's interleaved to Hugging Face's half-split rotary order."""
  rows, columns = weight.shape
  return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def divisors(
  head: int, theta: float, factor: float, low: float, high: float, trained: int
) -> np.ndarray:
  """Returns the divisors [H/2] of rotary frequencies that scale positions as Llama 3.1 does.

  Args:
    head: the width H of a head.
    theta: the base of frequencies.
    factor: the largest divisor.
    low, high: turns within the trained length, below which all and above which nothing is divided.
    trained: that length, in positions.
  """
  turns = trained * theta ** -(np.arange(0, head, 2) / head) / (2 * np.pi)
  kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
  result: np.ndarray = 1 / ((1 - kept) / factor + kept)
  return result
