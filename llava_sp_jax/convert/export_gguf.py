"""Writes GGUF files for llama.cpp: the decoder with its tokenizer, and what encodes pictures.

llama.cpp encodes pictures for models without spatial tokens only. The others get their image tokens
as embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax.convert import gguf_mmproj, gguf_vocabulary, hf_prompts, settings_out, tables
from llava_sp_jax.convert.gguf_names import (
  ARCHITECTURES,
  DIVISORS,
  EMBEDDING,
  PLAIN,
  SETTINGS,
  WIDTHS,
  divisors,
  head_count,
  interleaved,
  renamed,
)
from llava_sp_jax.convert.keys import Json
from llava_sp_jax.convert.leaves import to_tensors
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.convert.torch_io import FormatError, Tensor
from llava_sp_jax.data import conversation

DECODER = "model.gguf"
ROPES = ("default", "linear", "llama3")  # kinds of scaled positions that are written
_BY_TOKEN = (EMBEDDING, "output.weight")  # tensors with a row for each id


def refuse(model: Loaded) -> None:
  """Checks that llama.cpp computes a model's decoder, and that the library is there.

  Raises: FormatError.
  """
  text = model.config.model.language_model
  if text.rope_scaling.kind not in ROPES:
    raise FormatError(
      f"--format gguf: positions scaled as {text.rope_scaling.kind!r} are not written; known: "
      f"{', '.join(ROPES)}"
    )
  if model.tokenizer is None:
    raise FormatError(
      "--format gguf: this checkpoint has no tokenizer, and llama.cpp loads no model without one; "
      "put its files beside the weights and convert again"
    )
  try:
    import gguf  # noqa: F401
  except ImportError:
    raise FormatError(
      "--format gguf is written with the package gguf; pip install 'llava-sp-jax[gguf]'"
    ) from None


def note(model: Loaded) -> str:
  """Returns what a user must know of the files: how pictures get into llama.cpp."""
  if why := gguf_mmproj.obstacle(model.config):
    return (
      f"{DECODER} is the decoder alone: llama.cpp cannot encode the pictures, because {why}; give "
      "it what `llava-sp encode CKPT x.npy PICTURES` writes (docs/leaving.md)"
    )
  said = ", and ".join(gguf_mmproj.differences(model.config))
  return (
    f"image tokens will differ a little: llama.cpp {said}; for equal ones, give it what "
    "`llava-sp encode` writes (docs/leaving.md)"
  )


def write(model: Loaded, out: Path, tower: list[Tensor], projector: list[Tensor]) -> None:
  """Writes the files of a model without adapters to the folder `out`.

  `tower` and `projector` are their tensors, under the names of `tables` and `projector_names`.

  Raises: FormatError for a tokenizer that llama.cpp does not know.
  """
  _write_decoder(model, out / DECODER)
  if not gguf_mmproj.obstacle(model.config):
    named = [(renamed(t.name, gguf_mmproj.NAMES, back=True), t) for t in (*tower, *projector)]
    tensors = [t.renamed(name) for name, t in named if name]  # llama.cpp would apply the last norm
    values = gguf_mmproj.metadata(model.config)
    about = _about(model, "mmproj")
    for file in gguf_mmproj.files(model.config):
      found = [gguf_mmproj.ordered(t, file) for t in tensors]
      _save(out / file, gguf_mmproj.ARCHITECTURE, about, values, found)


def _write_decoder(model: Loaded, path: Path) -> None:
  assert model.tokenizer is not None  # `refuse` has checked it
  text, template = model.config.model.language_model, model.config.data.template
  words = gguf_vocabulary.of(model.tokenizer, template)
  count = len(words.tokens)
  if count > text.vocab_size:
    raise FormatError(
      f"{model.tokenizer}: {count:,} ids, but the embedding has {text.vocab_size:,} rows"
    )
  kind = settings_out.family(text)
  architecture = kind if kind in ARCHITECTURES else "llama"  # Mistral is LLaMA with a window
  values = settings_out.language_model_json(text, model.config.model.frozen_dtype)
  # llama.cpp has no windows in these architectures; within the window, nothing changes.
  longest = min(text.max_positions, text.sliding_window or text.max_positions)
  values |= {"vocab_size": count, "max_position_embeddings": longest}
  metadata: Json = {key: values[ours] for ours, (key, _) in SETTINGS.items()}
  metadata |= dict.fromkeys(WIDTHS, text.head_dim)
  scaling = text.rope_scaling
  if scaling.kind == "linear":
    metadata |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
  chat = hf_prompts.chat_template(conversation.TEMPLATES[template], pictures=hf_prompts.LLAMA_CPP)
  start = "{{ bos_token }}" if words.bos is not None else ""
  tokenizer = words.metadata() | ({"chat_template": start + chat} if chat else {})
  about = _about(model, "model") | {f"tokenizer.{key}": v for key, v in tokenizer.items()}
  names, in_pairs = ARCHITECTURES[architecture].names, ARCHITECTURES[architecture].interleaved
  tensors = [
    _tensor(tensor, names, text.heads, text.kv_heads, in_pairs, count)
    for tensor in to_tensors(model.part("language_model"), tables.LLAMA)
  ]
  if scaling.kind == "llama3":
    found = divisors(
      text.head_dim, text.rope_theta, scaling.factor, scaling.low_frequency,
      scaling.high_frequency, scaling.original_length,
    ).astype(np.float32)  # fmt: skip
    tensors.append(Tensor(DIVISORS, "config", found.shape, found.dtype, found.copy))
  _save(path, architecture, about, metadata, tensors)


def _tensor(
  tensor: Tensor, names: Any, heads: int, kv_heads: int, in_pairs: bool, count: int
) -> Tensor:
  """Returns a tensor of the decoder as the file has it.

  Rows of ids that the tokenizer lacks, which are never chosen, are left out.
  """
  name = renamed(tensor.name, names, back=True)
  assert name is not None, tensor.name  # both tables name all of a decoder
  groups = head_count(tensor.name, heads, kv_heads) if in_pairs else 0
  rows = min(count, tensor.shape[0]) if name in _BY_TOKEN else tensor.shape[0]

  def read() -> np.ndarray:
    values = tensor.array()[:rows]
    return interleaved(values, groups) if groups else values

  shape = (rows, *tensor.shape[1:])
  return dataclasses.replace(tensor, name=name, shape=shape, array=read)


def _about(model: Loaded, kind: str) -> Json:
  return {"general.type": kind, "general.name": model.config.name}


def _save(
  path: Path, architecture: str, about: Json, metadata: Json, tensors: Sequence[Tensor]
) -> None:
  """Writes a file tensor by tensor; the keys of `metadata` begin with the architecture.

  Vectors, and what llama.cpp adds or gathers, are float32, as llama.cpp expects them.
  """
  import gguf

  writer = gguf.GGUFWriter(path, architecture)
  for key, value in {**about, **{f"{architecture}.{k}": v for k, v in metadata.items()}}.items():
    _add(writer, key, value)
  kinds = {dtype: name for name, dtype in PLAIN.items()}
  stored = [
    PLAIN["F32"] if len(t.shape) == 1 or t.name in gguf_mmproj.EXACT else t.dtype for t in tensors
  ]
  for tensor, dtype in zip(tensors, stored, strict=True):
    kind = gguf.GGMLQuantizationType[kinds[dtype]]
    size = int(np.prod(tensor.shape)) * dtype.itemsize
    writer.add_tensor_info(tensor.name, tensor.shape, dtype, size, raw_dtype=kind)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_ti_data_to_file()
  for tensor, dtype in zip(tensors, stored, strict=True):
    values = np.ascontiguousarray(tensor.array().astype(dtype, copy=False))
    writer.write_tensor_data(values.view(f"u{dtype.itemsize}"))
  writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
  """Adds a key to a file, with the type that llama.cpp expects of such values."""
  add = {
    bool: writer.add_bool,
    int: writer.add_uint32,
    float: writer.add_float32,
    str: writer.add_string,
    list: writer.add_array,
  }
  add[type(value)](key, value)
