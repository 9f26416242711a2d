"""A trained model as inference needs it: config, parameters, tokenizer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import load
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
  config = run.config
  dtype = jnp.dtype(config.model.dtype)
  params = {
    path: jnp.asarray(leaf.read(), None if is_quantised(path) else dtype)
    for path, leaf in run.leaves.items()
  }
  tokenizer = Tokenizer(Path(folder) / "tokenizer")
  nested = unflatten_dict(params, sep="/")
  return Pretrained(config, nested, tokenizer, run.step, run.fingerprint)
