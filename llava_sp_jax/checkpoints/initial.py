"""Parameters before training: random, from a checkpoint of ours, from torch folders, from GGUF."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints.own_folders import ADAPTERS, abstract_leaves, open_init, random_leaves
from llava_sp_jax.convert import quantized
from llava_sp_jax.convert.leaves import Leaf, in_memory, refuse
from llava_sp_jax.models import build


def initial_params(
  config: config_lib.Config, shardings: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
  """Parameters before training, nested, as `config.init` says; what it does not name is random.

  With `init.checkpoint`, only adapters may be new: anything else that the checkpoint lacks is an
  error. `shardings` maps an abstract tree to where each leaf goes. With `model.quantize`, kernels
  are quantised on the way from their files.
  """
  form = build.quantization(config.model)
  floats = abstract_leaves(build.unquantized(config.model))
  found = open_init(config, floats)
  missing = {p: s for p, s in floats.items() if p not in found}
  if config.init.checkpoint:
    refuse(
      f"init.checkpoint {config.init.checkpoint}",
      [f"missing {p} {s.shape}" for p, s in missing.items() if not re.match(ADAPTERS, p)],
    )
  random = random_leaves(config, missing)
  expected = abstract_leaves(config.model) if form else floats
  if form:
    found |= in_memory({p: np.asarray(a) for p, a in random.items()})
    found = quantized.quantize(found, expected, form)
  places = shardings(expected) if shardings else dict.fromkeys(expected)
  placed = {
    p: _place(found[p], places[p]) if p in found else jax.device_put(random[p], places[p])
    for p in expected
  }
  return unflatten_dict(placed, sep="/")


def _place(leaf: Leaf, sharding: Any) -> jax.Array:
  """A leaf on its devices; each process reads the slices of its own."""
  if sharding is None:
    return jax.numpy.asarray(leaf.read())
  slices: dict[str, np.ndarray] = {}  # devices that hold the same slice share it

  def read(index: Any) -> np.ndarray:
    return slices.setdefault(str(index), leaf.read(index))

  return jax.make_array_from_callback(leaf.shape, sharding, read)
