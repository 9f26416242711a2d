"""A trained model as inference needs it: config, parameters, tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import load, save
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.models.quantize import NONE, is_quantised


@dataclasses.dataclass(frozen=True)
class Pretrained:
  config: config_lib.Config
  params: Any  # nested arrays, of the host or a device; each leaf in the dtype the model computes in, or quantised
  tokenizer: Tokenizer
  step: int = 0
  fingerprint: str = ""  # of the frozen base


def from_run(folder: str | Path, merge: bool = True, dtype: str = "") -> Pretrained:
  """Loads the latest checkpoint of a training run.

  `merge` folds adapters into kernels that are floats, computed in float32: each decoding step then
  reads fewer arrays. `dtype` of activations and parameters, if not the config's.

  Raises: CheckpointError.
  """
  run: Any = load.open_own(folder)
  if merge and run.config.model.quantize == NONE:
    run = save.fold(run)
  model = dataclasses.replace(run.config.model, dtype=dtype or run.config.model.dtype)
  config = dataclasses.replace(run.config, model=model)
  kept = np.dtype(jnp.dtype(model.dtype))
  params = {
    path: leaf.read() if is_quantised(path) else leaf.read().astype(kept)
    for path, leaf in run.leaves.items()
  }
  tokenizer = Tokenizer(Path(folder) / "tokenizer")
  nested = unflatten_dict(params, sep="/")
  return Pretrained(config, nested, tokenizer, run.step, run.fingerprint)
