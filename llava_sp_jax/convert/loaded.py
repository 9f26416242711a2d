"""Holds an opened checkpoint: its config, its parameters, which are not read yet, and its base."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert.leaves import Cast, Leaves

OURS = "llava_sp_jax"  # format of the folders that training and `convert` write


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Holds a checkpoint of any format that fits its model.

  Its parameters, `leaves`, include those of its base, and their values are still in their files.
  """

  format: str  # a row of catalog.FORMATS, or OURS
  config: config_lib.Config
  leaves: Leaves
  parts: tuple[str, ...]
  tokenizer: Path | None
  base: str = ""  # name or folder of the language model that the adapters were trained on
  tower: str = ""  # name or folder of the vision tower
  fingerprint: str = ""  # of the frozen base, if the checkpoint records it
  step: int = 0  # of training; this field and the next ones are for OURS only
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # its metadata
  originals: Leaves | None = None  # the leaves before the kernels of its base were quantized

  def part(self, name: str, *, adapters: bool = False) -> Leaves:
    """Returns the parameters of a part, such as "projector", by path: without LoRA or only LoRA."""
    return {
      p: leaf
      for p, leaf in self.leaves.items()
      if p.startswith(name + "/") and is_adapter(p) == adapters
    }

  def params(self) -> dict[str, np.ndarray]:
    """Reads the values of all parameters, those of the base included, in their stored dtypes.

    Returns: {path: array}, with paths such as "language_model/layers/q_proj/kernel".
    """
    return {path: leaf.read() for path, leaf in self.leaves.items()}


def is_adapter(path: str) -> bool:
  """Returns whether a path is that of a LoRA matrix."""
  return path.rsplit("/", 1)[-1] in ("lora_a", "lora_b")


def cast(source: Loaded, dtype: str) -> Loaded:
  """Returns the checkpoint with all parameters cast to `dtype` when they are read."""
  wanted = np.dtype(jnp.dtype(dtype))
  cast_leaves: Leaves = {p: Cast(p, leaf.shape, wanted, leaf) for p, leaf in source.leaves.items()}
  model = dataclasses.replace(source.config.model, frozen_dtype=dtype)
  config = dataclasses.replace(source.config, model=model)
  return dataclasses.replace(source, leaves=cast_leaves, config=config)
