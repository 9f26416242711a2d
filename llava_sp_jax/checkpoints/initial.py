"""Makes the parameters of step 0: random, from a run folder, from torch folders, or from GGUF."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints.own_folders import (
  ADAPTERS,
  abstract_leaves,
  open_init,
  random_leaves,
)
from llava_sp_jax.convert import quantized
from llava_sp_jax.convert.leaves import Leaf, in_memory, refuse
from llava_sp_jax.models import build


def initial_params(
  config: config_lib.Config,
  shardings: Callable[[Any], Any] | None = None,
  dtypes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """Returns the nested parameters of step 0, as `config.init` says; all others are random.

  With `init.checkpoint`, only adapters may be random. With `model.quantize`, weight matrices are
  quantized while they are read. Each array is made once, on its devices and in its dtype.

  Args:
    config: the config of the run.
    shardings: maps a `{path: shape}` tree to the sharding of each array; None puts all on the
      default device.
    dtypes: of arrays by path, to which they are rounded on their devices; None leaves them in the
      dtype of their file, or float32.

  Raises: FormatError that lists the other parameters that the checkpoint lacks.
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
  expected = abstract_leaves(config.model) if form else floats
  places = shardings(expected) if shardings else dict.fromkeys(expected)
  random = random_leaves(config, missing, None if form else places)
  if form:
    found |= in_memory({p: np.asarray(a) for p, a in random.items()})
    found = quantized.quantize(found, expected, form)
  placed = {}
  for path in expected:  # one after another, so that only one array is there in two dtypes
    made = _place(found[path], places[path]) if path in found else random.pop(path)
    placed[path] = made.astype(dtypes[path]) if dtypes else made
  result: dict[str, Any] = unflatten_dict(placed, sep="/")
  return result


def _place(leaf: Leaf, sharding: Any) -> jax.Array:
  """Puts a leaf on its devices; each process reads the slices of its own devices."""
  if sharding is None:
    return jax.numpy.asarray(leaf.read())
  slices: dict[str, np.ndarray] = {}  # read once for all devices that hold the same slice

  def read(index: Any) -> np.ndarray:
    return slices.setdefault(str(index), leaf.read(index))

  return jax.make_array_from_callback(leaf.shape, sharding, read)
