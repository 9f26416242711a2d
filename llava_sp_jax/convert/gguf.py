"""Reads LLaMA weights from GGUF files; dequantizes in numpy.

Tensors get Hugging Face's names. llama.cpp permutes the rows of q and k in some architectures,
which is undone here. A value that a file lacks is the default of llama.cpp's loader.
Source: the GGUF specification.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax.convert import keys
from llava_sp_jax.convert.gguf_file import Container, Place, open_container
from llava_sp_jax.convert.gguf_names import (
  ARCHITECTURES,
  DIVISORS,
  EMBEDDING,
  PLAIN,
  SETTINGS,
  WIDTHS,
  divisors,
  half_split,
  head_count,
  renamed,
)
from llava_sp_jax.convert.keys import FLAG, SIZE, Json, Table
from llava_sp_jax.convert.tensor import Tensor, Tensors
from llava_sp_jax.files import FormatError

_REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "rms_norm_eps")  # fmt: skip
_SCALED = keys.real(0.0, 1e6)
METADATA: Table = {
  **{key: keys.honored(kind, ours) for ours, (key, kind) in SETTINGS.items()},
  **keys.rows(keys.honored(SIZE, "width of a head, all of which is rotated"), *WIDTHS),
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


def open_llama(path: Path) -> Container:
  """Opens the container of a LLaMA. Raises: FormatError."""
  import gguf

  container = open_container(path, {int(k): v for k, v in gguf.GGML_QUANT_SIZES.items()})
  kind = architecture(container)
  if kind not in ARCHITECTURES:
    known = " or ".join(map(repr, ARCHITECTURES))
    raise FormatError(f"{path}: expected the architecture {known}, found {kind!a:.60}")
  parts = container.values.get("split.count", 1)
  if type(parts) is not int or parts > 1:
    raise FormatError(f"{path}: one part of several; join them with llama-gguf-split --merge")
  return container


def architecture(container: Container) -> str:
  """Returns the name of the model's architecture. Raises: FormatError without one."""
  return text(container, "general.architecture")


def text(container: Container, key: str) -> str:
  """Returns a text of the metadata. Raises: FormatError if there is none under `key`."""
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
  container = open_llama(path)
  sizes = _config(container, allow_unknown=True)
  heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
  row = ARCHITECTURES[architecture(container)]
  result: Tensors = {}
  for place in container.tensors:
    if place.name == DIVISORS:  # a setting, read by `_divided`
      continue
    name = renamed(place.name, row.names)
    if name is None:
      raise FormatError(f"{path}: unexpected tensor {place.name:.100}")
    read = _reader(container, place)
    if row.interleaved and (count := head_count(name, *heads)):
      if len(place.shape) != 2 or place.shape[0] % (2 * count):
        raise FormatError(f"{path}: {place.name} has shape {place.shape}, expected {count} heads")
      read = functools.partial(_in_order, read, count)
    result[name] = Tensor(name, str(path), place.shape, np.dtype(np.float32), read)
  return result


def _reader(container: Container, place: Place) -> Callable[[], np.ndarray]:
  """Returns a function that reads a tensor's values as float32. Raises: FormatError."""
  import gguf

  kind, file = gguf.GGMLQuantizationType(place.kind), container.file
  if kind.name in PLAIN:
    dtype = PLAIN[kind.name]
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


def _in_order(read: Callable[[], np.ndarray], heads: int) -> np.ndarray:
  return half_split(read(), heads)


def config(path: Path, allow_unknown: bool = False) -> Json:
  """Returns the settings of a GGUF file as keys of a Hugging Face `config.json`.

  Raises: FormatError for settings that are missing, unknown (unless `allow_unknown`) or not
    supported.
  """
  return _config(open_llama(path), allow_unknown)


def _config(container: Container, allow_unknown: bool) -> Json:
  path, tensors = container.file.path, {place.name: place for place in container.tensors}
  kind = architecture(container)
  given = {
    name.removeprefix(f"{kind}."): _plain(value)
    for name, value in container.values.items()
    if not name.startswith(_FREE) and not name.startswith("split.")
  }
  said = keys.read(given, METADATA, str(path), allow_unknown)
  result = {ours: said[key] for ours, (key, _) in SETTINGS.items() if key in said}
  missing = [SETTINGS[name][0] for name in _REQUIRED if name not in result]
  if missing or EMBEDDING not in tensors:
    raise FormatError(f"{path}: without {', '.join(missing) or EMBEDDING}, which every LLaMA has")
  heads = result["num_attention_heads"]
  head = result.get("head_dim") or result["hidden_size"] // heads
  for key in WIDTHS:
    if said.get(key, head) != head:
      raise FormatError(f"{path}: not supported: {key}={said[key]} (known: {head}, a head's width)")
  return {
    "model_type": kind,
    "vocab_size": tensors[EMBEDDING].shape[0],
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
  place = next((p for p in container.tensors if p.name == DIVISORS), None)
  if place is None:
    return {}
  found = _reader(container, place)()
  factor = float(found.max(initial=1.0))
  wanted = divisors(head, theta, factor, _LOW, _HIGH, _TRAINED)
  if found.shape != wanted.shape or not np.allclose(found, wanted, rtol=1e-3):
    raise FormatError(
      f"{container.file.path}: not supported: {DIVISORS} holds other divisors than Llama 3.1's "
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
