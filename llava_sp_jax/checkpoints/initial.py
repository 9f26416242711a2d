"""Parameters before training: random, from a checkpoint of ours, from torch folders, from GGUF."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints.opening import ADAPTERS, finished, is_ours
from llava_sp_jax.convert import formats, quantised
from llava_sp_jax.convert.leaves import Leaf, Leaves, fit, in_memory, refuse
from llava_sp_jax.models import build


def initial_params(
  config: config_lib.Config, shardings: Callable[[Any], Any] | None = None
) -> dict[str, Any]:
  """Parameters before training, nested, as `config.init` says; what it does not name is random.

  With `init.checkpoint`, only adapters may be new: anything else that the checkpoint lacks is an
  error. `shardings` maps an abstract tree to where each leaf goes. With `model.quantize`, kernels
  are quantised on the way from their files.
  """
  form = build.quantisation(config.model)
  floats = _abstract(build.unquantised(config.model))
  found = _open_init(config, floats)
  missing = {p: s for p, s in floats.items() if p not in found}
  if config.init.checkpoint:
    refuse(
      f"init.checkpoint {config.init.checkpoint}",
      [f"missing {p} {s.shape}" for p, s in missing.items() if not re.match(ADAPTERS, p)],
    )
  random = _random(config, missing)
  expected = _abstract(config.model) if form else floats
  if form:
    found |= in_memory({p: np.asarray(a) for p, a in random.items()})
    found = quantised.quantise(found, expected, form)
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


def _abstract(model: config_lib.Model) -> dict[str, jax.ShapeDtypeStruct]:
  return flatten_dict(build.abstract(model), sep="/")


def _random(config: config_lib.Config, wanted: dict[str, Any]) -> dict[str, jax.Array]:
  """Random leaves, not quantised; the compiler leaves out what is not wanted."""
  if not wanted:
    return {}

  def leaves(rng: jax.Array) -> dict[str, jax.Array]:
    flat = flatten_dict(build.initialise(build.unquantised(config.model), rng), sep="/")
    return {path: flat[path] for path in wanted}

  return jax.jit(leaves)(jax.random.key(config.train.seed))


def _open_init(config: config_lib.Config, expected: dict[str, Any]) -> Leaves:
  """What `config.init` names, each part checked for completeness."""
  init = config.init
  if init.checkpoint and (init.language_model or init.vision_tower):
    raise config_lib.ConfigError(
      "config.init: a checkpoint brings its own base; leave out language_model and vision_tower"
    )
  found: Leaves = {}
  problems: list[str] = []
  if init.checkpoint:
    leaves = finished(init.checkpoint, "init.checkpoint").originals
    fit(leaves, {p: s for p, s in expected.items() if p in leaves}, problems)
    refuse(f"init.checkpoint {init.checkpoint}", problems)
    return leaves
  for part in ("language_model", "vision_tower"):
    path = getattr(init, part)
    if not path:
      continue
    leaves = _open_part(path, part, config)
    wanted = {p: s for p, s in expected.items()
              if p.startswith(part + "/") and not re.match(ADAPTERS, p)}  # fmt: skip
    fit(leaves, wanted, problems)
    refuse(f"init.{part} {path}", problems)
    found |= leaves
  return found


def _open_part(path: str, part: str, config: config_lib.Config) -> Leaves:
  """One part of a checkpoint of ours or of a torch folder."""
  if is_ours(path):
    leaves = finished(path, f"init.{part}").originals
  else:
    options = formats.Options(select_layer=config.model.tower.select_layer)
    source = formats.open_checkpoint(path, options)
    _same_sizes(path, part, source.config.model, config.model)
    leaves = source.leaves
  return {p: leaf for p, leaf in leaves.items() if p.startswith(part + "/")}


# Values of a part that change none of its numbers.
_FREE = (".initializer_range", ".max_positions", ".layers", ".select_layer")


def _same_sizes(path: str, part: str, theirs: config_lib.Model, ours: config_lib.Model) -> None:
  """Raises: ConfigError where a torch folder's settings contradict the config."""
  group = {"language_model": "language_model", "vision_tower": "tower"}[part]
  lines = config_lib.differences(getattr(ours, group), getattr(theirs, group), f"model.{group}")
  free = _FREE if part == "vision_tower" else _FREE[:2]
  lines = [line for line in lines if not line.split(":")[0].endswith(free)]
  if lines:
    raise config_lib.ConfigError(
      f"init.{part} {path} contradicts the config ('here' is the config, 'there' the folder):\n  "
      + "\n  ".join(lines)
    )
