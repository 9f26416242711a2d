"""A checkpoint that was opened: its config, its leaves still in their files, what it stands on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert.leaves import Cast, Leaves

OURS = "llava_sp_jax"  # the format of folders that training and `convert` write


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A checkpoint, ours or of others, that fits its model; `leaves` are still in their files."""

  format: str  # a row of catalog.FORMATS, or OURS
  config: config_lib.Config
  leaves: Leaves
  parts: tuple[str, ...]
  tokenizer: Path | None
  base: str = ""  # name or folder of the language model that the adapters were trained on
  tower: str = ""  # name or folder of the vision tower
  fingerprint: str = ""  # of the frozen base, where the checkpoint says it
  step: int = 0  # of training; the rest is of our format alone:
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what it says of itself
  originals: Leaves | None = None  # the leaves before the kernels of its base were quantized

  def part(self, name: str, *, adapters: bool = False) -> Leaves:
    """The leaves of one part, or its adapters."""
    return {
      p: leaf
      for p, leaf in self.leaves.items()
      if p.startswith(name + "/") and is_adapter(p) == adapters
    }

  def params(self) -> dict[str, np.ndarray]:
    """All leaves read, flat."""
    return {path: leaf.read() for path, leaf in self.leaves.items()}


def is_adapter(path: str) -> bool:
  return path.rsplit("/", 1)[-1] in ("lora_a", "lora_b")


def cast(source: Loaded, dtype: str) -> Loaded:
  """The same model with every leaf in one dtype."""
  wanted = np.dtype(jnp.dtype(dtype))
  cast_leaves: Leaves = {p: Cast(p, leaf.shape, wanted, leaf) for p, leaf in source.leaves.items()}
  model = dataclasses.replace(source.config.model, frozen_dtype=dtype)
  config = dataclasses.replace(source.config, model=model)
  return dataclasses.replace(source, leaves=cast_leaves, config=config)
