"""Loads a trained model for inference: config, parameters and tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax import storage
from llava_sp_jax.checkpoints import opening, own_folders, tokenizers
from llava_sp_jax.convert import folding, formats, places, quantized
from llava_sp_jax.convert.leaves import Leaves
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.models import build
from llava_sp_jax.models.parameters import Params
from llava_sp_jax.models.quantize import NONE, is_quantized


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """Holds a trained model for inference: its config, all of its parameters, and its tokenizer.

  `step` is the training step of the checkpoint; 0 for a converted or foreign one. `fingerprint` is
  a hash of the frozen parameters (`checkpoints.fingerprints`); "" if it was not computed.
  """

  config: config_lib.Config
  params: Params  # on the host or a device, in the model's dtype or quantized
  tokenizer: Tokenizer
  step: int = 0
  fingerprint: str = ""  # of the frozen base


def padded_from(model: Pretrained) -> int:
  """Returns the first token id that has a row in the embedding but is not in the tokenizer.

  Returns 0 if the tokenizer has all ids. Such rows only pad the embedding to a round size.
  """
  known, rows = len(model.tokenizer), model.config.model.language_model.vocab_size
  return known if known < rows else 0


def from_run(
  folder: str | Path, merge: bool = True, dtype: str = "", weights: str = "", cache: str = ""
) -> Pretrained:
  """Loads the latest checkpoint of a training run, or a folder that `convert` wrote.

  Args:
    folder: the run folder.
    merge: whether to add LoRA adapters to the weights that they adapt, in float32, so that a
      decoding step reads fewer arrays. A quantized model keeps its adapters, without `weights`.
    dtype: dtype of activations and parameters, "float32" or "bfloat16"; "" is the config's.
    weights: format of the decoder's weight matrices, a row of `models.quantize.FORMATS`, with the
      adapters in them; "" is the config's.
    cache: format of keys and values, a row of `models.cache.FORMATS`; "" is the config's.

  Raises:
    ConfigError: for an unknown format, or one that does not fit the model.
    CheckpointError: for a folder that is no run, a run without a readable checkpoint, or one whose
      base has changed.
    FormatError: for a folder without a complete model.
  """
  build.check_formats(weights, cache)
  run = own_folders.open_own(folder)
  _whole(folder, run)
  run = answering(run, merge, dtype, weights, cache)
  return _pretrained(run, Tokenizer(storage.place(folder) / "tokenizer"))


def from_any(
  path: str | Path,
  options: formats.Options | None = None,
  merge: bool = True,
  dtype: str = "",
  weights: str = "",
  cache: str = "",
) -> Pretrained:
  """Loads a run, or a folder of any format that `llava-sp convert` reads, without writing a copy.

  Args:
    path: a run folder, a folder or file of a foreign format, or a repository on the Hugging Face
      hub ("organization/name").
    options: what a foreign checkpoint does not say itself, such as its base; None is nothing.
    merge: as in `from_run`, whether to add LoRA adapters to the weights that they adapt.
    dtype: dtype of activations and parameters; "" is the checkpoint's.
    weights, cache: as in `from_run`, formats of weight matrices, and of keys and values.

  Raises:
    ConfigError: for an unknown format, or one that does not fit the model.
    CheckpointError: for a run that cannot be read, or whose base has changed.
    FormatError: for a folder of no known format, or without a complete model and tokenizer.
  """
  build.check_formats(weights, cache)
  path = path if own_folders.is_ours(path) else places.local(str(path))
  if own_folders.is_ours(path) or not Path(path).exists():
    return from_run(path, merge, dtype, weights, cache)
  source = formats.open_checkpoint(path, options or formats.Options())
  _whole(path, source)
  tokenizer = tokenizers.open_tokenizer(source)
  if tokenizer is None:
    raise FormatError(f"{path}: no tokenizer in it; put the language model's tokenizer files there")
  opening.verify_base(source)
  if not source.fingerprint:
    source = dataclasses.replace(source, fingerprint=opening.base_fingerprint(source))
  return _pretrained(answering(source, merge, dtype, weights, cache), tokenizer)


def _whole(path: str | Path, model: Loaded) -> None:
  """Raises FormatError when a part of the model is missing."""
  if lacking := [part for part in formats.PARTS if part not in model.parts]:
    raise FormatError(
      f"{path}: no {', '.join(lacking)} in it; a whole model is needed to answer questions"
    )


def answering(
  model: Loaded, merge: bool = True, dtype: str = "", weights: str = "", cache: str = ""
) -> Loaded:
  """Returns a checkpoint as it is to answer; the arguments are those of `from_run`.

  Kernels are folded and quantized layer by layer when they are read. With `weights`, those of a
  quantized base are first the floats that its codes stand for, on which its adapters were trained.

  Raises: ConfigError for an unknown format, or one that does not fit the model.
  """
  if weights:
    form = build.quantization(model.config.model)
    floats = quantized.dequantize(model.leaves, form, "float32")
    model = _with(model, build.unquantized(model.config.model), floats)
  if (merge or weights) and model.config.model.quantize == NONE:
    model = folding.fold(model)
  config, leaves = build.answering(model.config.model, weights, cache), model.leaves
  if weights:
    form = build.quantization(config)
    leaves = quantized.quantize(leaves, own_folders.abstract_leaves(config), form)
  return _with(model, dataclasses.replace(config, dtype=dtype or config.dtype), leaves)


def _with(model: Loaded, config: config_lib.ModelConfig, leaves: Leaves) -> Loaded:
  return dataclasses.replace(
    model, config=dataclasses.replace(model.config, model=config), leaves=leaves
  )


def _pretrained(model: Loaded, tokenizer: Tokenizer) -> Pretrained:
  params = _params(model.config, model.leaves)
  return Pretrained(model.config, params, tokenizer, model.step, model.fingerprint)


def _params(config: config_lib.Config, leaves: Leaves) -> Any:
  kept = np.dtype(jnp.dtype(config.model.dtype))
  params = {
    path: leaf.read() if is_quantized(path) else leaf.read().astype(kept)
    for path, leaf in leaves.items()
  }
  return unflatten_dict(params, sep="/")


def as_computed(config: config_lib.Config, params: Params) -> Params:
  """Casts parameters to the dtype that the model computes in; quantized kernels keep theirs.

  `params` is the nested tree of all parameters, as training holds them.
  """
  dtype = jnp.dtype(config.model.dtype)
  flat = {
    path: leaf if is_quantized(path) else leaf.astype(dtype)
    for path, leaf in flatten_dict(params, sep="/").items()
  }
  result: Params = unflatten_dict(flat, sep="/")
  return result
