"""Reads LLaMA weights and tokenizers from GGUF files; dequantizes in numpy.

Tensors get Hugging Face's names. llama.cpp's `convert_hf_to_gguf.py` permutes the rows of q and k,
which is undone here. A value that a file lacks is the default of llama.cpp's loader.
Source: the GGUF specification.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax.convert import keys
from llava_sp_jax.convert.gguf_file import Container, Place, open_container
from llava_sp_jax.convert.keys import FLAG, LAYERS, POSITIVE, SIZE, Json, Table
from llava_sp_jax.convert.tensor import BFLOAT16, Tensor, Tensors
from llava_sp_jax.files import FormatError

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
_EMBEDDING = "token_embd.weight"
_DIVISORS = "rope_freqs.weight"  # divisors of rotary frequencies, since Llama 3.1

# Names in config.json -> (key in the file, kind of its value).
_ONE_TO_ONE = {
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
_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "rms_norm_eps")  # fmt: skip
_SCALED = keys.real(0.0, 1e6)
METADATA: Table = {
  **{key: keys.honored(kind, ours) for ours, (key, kind) in _ONE_TO_ONE.items()},
  "attention.value_length": keys.honored(SIZE, "width of a head"),
  "rope.dimension_count": keys.honored(SIZE, "width of a head, all of which is rotated"),
  "rope.scaling.type": keys.honored(keys.choice("none", "linear"), "how positions are stretched"),
  "rope.scaling.factor": keys.honored(_SCALED, "by how much"),
  "rope.scale_linear": keys.honored(_SCALED, "older name of rope.scaling.factor"),
  "rope.scaling.original_context_length": keys.idle("for yarn, which is refused"),
  "rope.scaling.finetuned": keys.idle("says how the model was made", FLAG),
  "attention.layer_norm_epsilon": keys.idle("for norms that LLaMA does not have"),
  "attention.causal": keys.only("a token sees those before it", True),
  "tensor_data_layout": keys.idle("rows of q and k are always in llama.cpp's order"),
  **keys.rows(keys.never("a mixture of experts is not computed here"), "expert_count",
    "expert_used_count"),
  **keys.rows(keys.never("not computed here"), "attention.sliding_window", "logit_scale",
    "attn_logit_softcapping", "final_logit_softcapping", "attention.scale",
    "attention.clamp_kqv", "attention.max_alibi_bias", "embedding_scale", "residual_scale"),
}  # fmt: skip
_FREE = ("general.", "tokenizer.", "quantize.")  # keys without effect on the weights


def _open(path: Path) -> Container:
  """Opens the container of a LLaMA. Raises: FormatError."""
  import gguf

  container = open_container(path, {int(k): v for k, v in gguf.GGML_QUANT_SIZES.items()})
  kind = _text(container, "general.architecture")
  if kind != "llama":
    raise FormatError(f"{path}: expected the architecture 'llama', found {kind!a:.60}")
  parts = container.values.get("split.count", 1)
  if type(parts) is not int or parts > 1:
    raise FormatError(f"{path}: one part of several; join them with llama-gguf-split --merge")
  return container


def _text(container: Container, key: str) -> str:
  try:
    result: str = container.values[key].decode()
    return result
  except (KeyError, AttributeError, UnicodeDecodeError):
    raise FormatError(f"{container.file.path}: no text under the key {key}") from None


def open_gguf(path: Path) -> Tensors:
  """Returns the weights by Hugging Face's names, which are dequantized to float32 when read.

  Raises: FormatError for a file that cannot be read, another model than a LLaMA, or a type of
    quantization that is not supported.
  """
  container = _open(path)
  sizes = _config(container, allow_unknown=True)
  heads = {"q": sizes["num_attention_heads"], "k": sizes["num_key_value_heads"]}
  result: Tensors = {}
  for place in container.tensors:
    if place.name == _DIVISORS:  # a setting, read by `_divided`
      continue
    name = _name(place.name, path)
    read = _reader(container, place)
    projection = re.search(r"\.([qk])_proj\.", name)
    if projection:
      count = heads[projection.group(1)]
      if len(place.shape) != 2 or place.shape[0] % (2 * count):
        raise FormatError(f"{path}: {place.name} has shape {place.shape}, expected {count} heads")
      read = functools.partial(_unpermuted, read, count)
    result[name] = Tensor(name, str(path), place.shape, np.dtype(np.float32), read)
  return result


def _name(name: str, path: Path) -> str:
  for pattern, target in NAMES:
    if re.fullmatch(pattern, name):
      return re.sub(pattern, target, name)
  raise FormatError(f"{path}: unexpected tensor {name:.100}")


def _reader(container: Container, place: Place) -> Callable[[], np.ndarray]:
  """Returns a function that reads a tensor's values as float32. Raises: FormatError."""
  import gguf

  kinds, file = gguf.GGMLQuantizationType, container.file
  kind, plain = (
    kinds(place.kind),
    {
      kinds.F32: np.dtype(np.float32),
      kinds.F16: np.dtype(np.float16),
      kinds.BF16: BFLOAT16,
    },
  )
  if kind in plain:
    dtype = plain[kind]
    count = place.size // dtype.itemsize
    return lambda: (
      file.map(dtype, place.start, count, container.big_endian)
      .reshape(place.shape)
      .astype(np.float32, copy=False)
    )
  if container.big_endian:
    raise FormatError(f"{file.path}: quantized and big-endian ({place.name}), which is not read")
  if not _can_dequantize(kind):
    raise FormatError(f"{file.path}: {place.name} is stored as {kind.name}, which is not read")
  block, size = gguf.GGML_QUANT_SIZES[kind]
  rows = (*place.shape[:-1], place.shape[-1] // block * size)

  def read() -> np.ndarray:
    stored = file.map(np.dtype(np.uint8), place.start, place.size).reshape(rows)
    with np.errstate(all="ignore"):  # the reader refuses values that are not finite
      return gguf.quants.dequantize(stored, kind).astype(np.float32, copy=False)

  return read


@functools.cache
def _can_dequantize(kind: Any) -> bool:
  import gguf

  try:
    gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
  except NotImplementedError:
    return False
  return True


def _unpermuted(read: Callable[[], np.ndarray], heads: int) -> np.ndarray:
  """Reorders rows from llama.cpp's interleaved to Hugging Face's half-split rotary order."""
  weight = read()
  rows, columns = weight.shape
  return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def config(path: Path, allow_unknown: bool = False) -> Json:
  """Returns the settings of a GGUF file as keys of a Hugging Face `config.json`.

  Raises: FormatError for settings that are missing, unknown (unless `allow_unknown`) or not
    supported.
  """
  return _config(_open(path), allow_unknown)


def _config(container: Container, allow_unknown: bool) -> Json:
  path, tensors = container.file.path, {place.name: place for place in container.tensors}
  given = {
    name.removeprefix("llama."): _plain(value)
    for name, value in container.values.items()
    if not name.startswith(_FREE) and not name.startswith("split.")
  }
  said = keys.read(given, METADATA, str(path), allow_unknown)
  result = {ours: said[key] for ours, (key, _) in _ONE_TO_ONE.items() if key in said}
  missing = [_ONE_TO_ONE[name][0] for name in _REQUIRED if name not in result]
  if missing or _EMBEDDING not in tensors:
    raise FormatError(f"{path}: without {', '.join(missing) or _EMBEDDING}, which every LLaMA has")
  heads = result["num_attention_heads"]
  head = result.get("head_dim") or result["hidden_size"] // heads
  for key in ("attention.value_length", "rope.dimension_count"):
    if said.get(key, head) != head:
      raise FormatError(f"{path}: not supported: {key}={said[key]} (known: {head}, a head's width)")
  return {
    "model_type": "llama",
    "vocab_size": tensors[_EMBEDDING].shape[0],
    "num_key_value_heads": heads,
    "rope_theta": 10000.0,
    **result,
    **_stretched(said),
    **_divided(container, head, result.get("rope_theta", 10000.0)),
    "rms_norm_eps": round(float(result["rms_norm_eps"]), 9),
    "tie_word_embeddings": "output.weight" not in tensors,
  }


def _stretched(said: Json) -> Json:
  """Returns the linear scaling of positions.

  llama.cpp uses it if there is a factor and no other type of scaling.
  """
  factor = float(said.get("rope.scaling.factor", said.get("rope.scale_linear")) or 0)
  if said.get("rope.scaling.type") == "none" or factor in (0, 1):
    return {}
  return {"rope_scaling": {"rope_type": "linear", "factor": factor}}


def _divided(container: Container, head: int, theta: float) -> Json:
  """Returns the scaling of Llama 3.1, found from the divisors of rotary frequencies in the file.

  The published models differ only in the factor, which is the largest divisor.

  Raises: FormatError for other divisors.
  """
  place = next((p for p in container.tensors if p.name == _DIVISORS), None)
  if place is None:
    return {}
  found = _reader(container, place)()
  factor = float(found.max(initial=1.0))
  turns = _TRAINED * theta ** -(np.arange(0, head, 2) / head) / (2 * np.pi)
  kept = np.clip((turns - _LOW) / (_HIGH - _LOW), 0.0, 1.0)
  wanted = 1 / ((1 - kept) / factor + kept)
  if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-3):
    raise FormatError(
      f"{container.file.path}: not supported: {_DIVISORS} holds other divisors than Llama 3.1's "
      f"for {_TRAINED:,} positions"
    )
  if factor == 1.0:
    return {}
  return {
    "rope_scaling": {
      "rope_type": "llama3",
      "factor": factor,
      "low_freq_factor": _LOW,
      "high_freq_factor": _HIGH,
      "original_max_position_embeddings": _TRAINED,
    }
  }


_TRAINED, _LOW, _HIGH = 8192, 1.0, 4.0


def _plain(value: Any) -> Any:
  """Returns a value of the container as JSON would have it."""
  if isinstance(value, bytes):
    return value.decode("utf-8", "backslashreplace")
  return value.tolist() if isinstance(value, np.ndarray) else value


def write_tokenizer(path: Path, out: Path) -> None:
  """Rebuilds SmolLM's byte-level BPE from the GGUF's metadata as a Hugging Face folder.

  Raises: FormatError for a pre-tokenizer other than `smollm`, and for inconsistent parts.
  """
  from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  container = _open(path)
  if (pre := _text(container, "tokenizer.ggml.pre")) != "smollm":
    raise FormatError(f"{path}: knows the pre-tokenizer 'smollm', found {pre!a:.60}")
  tokens, merges = _texts(container, "tokens"), _texts(container, "merges")
  pairs: Any = [tuple(m.split(" ")) for m in merges]
  kinds, control = container.values.get("tokenizer.ggml.token_type"), 3
  if (
    len(set(tokens)) < len(tokens) or not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens)
  ):
    raise FormatError(
      f"{path}: tokenizer.ggml: a token twice, or not one token_type for each token"
    )
  try:
    bpe = models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=pairs, fuse_unk=False)
  except Exception as error:  # any error of the library for merges of other tokens
    raise FormatError(
      f"{path}: tokenizer.ggml: its merges do not fit its tokens ({error})"
    ) from None
  tokenizer = Tokenizer(bpe)
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
  )
  tokenizer.decoder = decoders.ByteLevel()
  special = [t for t, k in zip(tokens, kinds, strict=True) if k == control]
  tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
  named = {
    f"{name}_token": _token(container, tokens, f"{long}_token_id")
    for name, long in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"))
  }
  PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(str(out))


def _texts(container: Container, key: str) -> list[str]:
  try:
    return [text.decode() for text in container.values[f"tokenizer.ggml.{key}"]]
  except (KeyError, AttributeError, TypeError, UnicodeDecodeError):
    raise FormatError(
      f"{container.file.path}: no list of UTF-8 texts under tokenizer.ggml.{key}"
    ) from None


def _token(container: Container, tokens: list[str], key: str) -> str:
  number = container.values.get(f"tokenizer.ggml.{key}")
  if type(number) is not int or not 0 <= number < len(tokens):
    raise FormatError(f"{container.file.path}: tokenizer.ggml.{key} is no token: {number!a:.40}")
  return tokens[number]
