"""A trained model as inference needs it: config, parameters, tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import formats, load
from llava_sp_jax.convert.leaves import Leaves
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.models.quantize import is_quantised


@dataclasses.dataclass(frozen=True)
class Pretrained:
  config: config_lib.Config
  params: Any  # nested; each leaf in the dtype the model computes in, or quantised
  tokenizer: Tokenizer
  step: int = 0
  fingerprint: str = ""  # of the frozen base


def from_run(folder: str | Path) -> Pretrained:
  """Loads the latest checkpoint of a training run. Raises: CheckpointError."""
  run = load.open_own(folder)
  tokenizer = Tokenizer(Path(folder) / "tokenizer")
  return Pretrained(
    run.config, _params(run.config, run.leaves), tokenizer, run.step, run.fingerprint
  )


def from_any(path: str | Path, options: formats.Options | None = None) -> Pretrained:
  """Loads a run, or a folder of any format that `llava-sp convert` reads, without writing a copy.

  Raises: CheckpointError, FormatError (also for a folder that is not a whole model).
  """
  if load.is_ours(path):
    return from_run(path)
  source = load.open_any(path, options or formats.Options())
  if lacking := [part for part in formats.PARTS if part not in source.parts]:
    raise FormatError(
      f"{path}: no {', '.join(lacking)} in it; a whole model is needed to answer questions"
    )
  load.verify_base(source)
  if source.tokenizer is None:
    raise FormatError(f"{path}: no tokenizer in it; put the language model's tokenizer files there")
  return Pretrained(
    source.config, _params(source.config, source.leaves), Tokenizer(source.tokenizer), 0,
    source.fingerprint,
  )  # fmt: skip


def _params(config: config_lib.Config, leaves: Leaves) -> Any:
  dtype = jnp.dtype(config.model.dtype)
  params = {
    path: jnp.asarray(leaf.read(), None if is_quantised(path) else dtype)
    for path, leaf in leaves.items()
  }
  return unflatten_dict(params, sep="/")


def as_computed(config: config_lib.Config, params: Any) -> Any:
  """Nested parameters as training holds them -> as `from_run` loads them from its checkpoint."""
  dtype = jnp.dtype(config.model.dtype)
  flat = {
    path: leaf if is_quantised(path) else leaf.astype(dtype)
    for path, leaf in flatten_dict(params, sep="/").items()
  }
  return unflatten_dict(flat, sep="/")
