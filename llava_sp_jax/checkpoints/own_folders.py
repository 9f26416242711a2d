"""Opens run folders of this package: the trained parameters over the base that the config names.

The base is where the frozen parameters are read from, and may be another such folder. Parameters
stay in their files until they are placed on devices. All missing, unexpected and mis-shaped ones
are reported at once.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax import storage
from llava_sp_jax.checkpoints import fingerprints, manager, on_disk, runs, stream
from llava_sp_jax.convert import formats, places, quantized
from llava_sp_jax.convert.leaves import Cast, Leaf, Leaves, fit, in_memory, refuse
from llava_sp_jax.convert.loaded import OURS, Loaded
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.models import build
from llava_sp_jax.models.quantize import is_quantized

ADAPTERS = r"language_model/.*/lora_[ab]$"


def is_ours(folder: str | Path) -> bool:
  """Returns whether a folder is a run folder: it has a config.json and a folder checkpoints/."""
  place = storage.place(folder)
  storage.check(place)
  return (place / runs.CONFIG_FILE).is_file() and (place / "checkpoints").is_dir()


def located(config: config_lib.Config, folder: str | Path) -> config_lib.Config:
  """Returns the config of a run with the paths of `init` as they are reached from here.

  A relative path was resolved where training ran. It is looked up in the current folder and in the
  folders above the run folder.
  """

  def place(path: str) -> str:
    if not path or storage.place(path).exists():
      return path
    above = storage.absolute(storage.place(folder)).parents
    seen = (there / path for there in (above[:-2] if storage.remote(folder) else above))
    return next((str(there) for there in seen if there.exists()), path)

  init = {name: place(path) for name, path in dataclasses.asdict(config.init).items()}
  return dataclasses.replace(config, init=config_lib.InitConfig(**init))


def open_own(folder: str | Path, verify: bool = True) -> Loaded:
  """Opens the latest checkpoint: the trained parameters over the base that the config names.

  With `verify`, all values are read. If the trained parameters of a step do not match their
  checksums, the step is reported and the one before it is opened.

  Raises: CheckpointError when no step can be used, or the base is not the one it was trained with.
  """
  config = located(runs.read_config(folder), folder)
  place, about, step = runs.saved(folder, functools.partial(_check_trained, verify=verify))
  trained = stream.SavedItem(place).leaves()
  form = build.quantization(config.model)
  expected = abstract_leaves(build.unquantized(config.model))
  parts = about.get("parts", list(formats.PARTS))
  expected = {p: s for p, s in expected.items() if p.split("/")[0] in parts}
  base = {p: leaf for p, leaf in open_init(config, expected).items() if p not in trained}
  missing = {p: s for p, s in expected.items() if p not in trained and p not in base}
  base |= in_memory({p: np.asarray(a) for p, a in random_leaves(config, missing).items()})
  problems: list[str] = []
  fit({**base, **trained}, expected, problems)
  refuse(str(folder), problems)
  originals: Leaves = {**base, **trained}
  if form:
    base = quantized.quantize(base, abstract_leaves(config.model), form)
  if verify:
    found = fingerprints.fingerprint(AsFrozen(base, config.model.frozen_dtype))
    if found != about["fingerprint"]:
      raise CheckpointError(
        f"{folder}: its frozen base has fingerprint {about['fingerprint']}, but config.init leads "
        f"to {found}; restore the files that config.init names"
      )
  frozen = {p: _cast(leaf, config.model.frozen_dtype) for p, leaf in base.items()}
  leaves: Leaves = {**frozen, **trained}
  tokenizer = storage.place(folder) / "tokenizer"
  return Loaded(
    OURS,
    config,
    leaves,
    tuple(p for p in formats.PARTS if any(q.startswith(p + "/") for q in leaves)),
    storage.of(tokenizer).local(tokenizer) if tokenizer.is_dir() else None,
    base=places.reachable(about.get("base", "")),
    tower=places.reachable(about.get("tower", "")),
    fingerprint=about["fingerprint"],
    step=step,
    about=about,
    originals=originals if form else leaves,
  )


def _check_trained(place: Path, about: dict[str, Any], verify: bool) -> None:
  """Opens the parameters of a step, and compares them with its checksums, if it has any.

  Parameters are read one by one here, and again when they are used. Moments are not read.

  Raises: CheckpointError when they cannot be read, or differ from what was saved.
  """
  known = on_disk.checksums(place).get("params", {})

  def read() -> None:
    leaves = stream.SavedItem(place / "params").leaves()
    for path, leaf in leaves.items() if verify and known else ():
      found = fingerprints.sums({path: jax.numpy.asarray(leaf.read())})
      fingerprints.compare_sums(found, known, place)

  manager.as_checkpoint_error(f"{place}: cannot be read", read)


class AsFrozen(Mapping[str, Any]):
  """Maps paths to arrays in the dtype of frozen parameters, and reads each one on access.

  Arrays of quantized kernels keep their own dtypes.
  """

  def __init__(self, leaves: Leaves, dtype: str):
    self._leaves, self._dtype = leaves, dtype

  def __getitem__(self, path: str) -> jax.Array:
    return jax.numpy.asarray(_cast(self._leaves[path], self._dtype).read())

  def __iter__(self) -> Iterator[str]:
    return iter(self._leaves)

  def __len__(self) -> int:
    return len(self._leaves)


def _cast(leaf: Leaf, dtype: str) -> Leaf:
  wanted = np.dtype(jax.numpy.dtype(dtype))
  as_it_is = leaf.dtype == wanted or is_quantized(leaf.path)
  return leaf if as_it_is else Cast(leaf.path, leaf.shape, wanted, leaf)


def finished(folder: str | Path, key: str) -> Loaded:
  """Opens a run of which the last checkpoint is that of its last step.

  `key` names the setting that `folder` comes from, for the message.

  Raises: CheckpointError when the run stopped before its last step, or `open_own` cannot open it.
  """
  run = open_own(folder)
  if run.step < run.config.train.steps:
    raise CheckpointError(
      f"{key} {folder}: stopped at step {run.step} of {run.config.train.steps}; finish it first"
    )
  return run


def _floats(loaded: Loaded) -> Leaves:
  """Returns the parameters as they were before any was quantized."""
  return loaded.leaves if loaded.originals is None else loaded.originals


def abstract_leaves(model: config_lib.ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns {path: shape and dtype} of all parameters of a model; paths are joined by "/"."""
  result: dict[str, jax.ShapeDtypeStruct] = flatten_dict(build.abstract(model), sep="/")
  return result


def random_leaves(
  config: config_lib.Config, wanted: dict[str, Any], places: Mapping[str, Any] | None = None
) -> dict[str, jax.Array]:
  """Returns the parameters at the paths of `wanted` with random values, not quantized.

  The seed is `train.seed`. The compiler removes the initialization of all others. `places` has
  shardings by path; the values do not depend on them.
  """
  if not wanted:
    return {}

  def leaves(rng: jax.Array) -> dict[str, jax.Array]:
    flat = flatten_dict(build.initialize(build.unquantized(config.model), rng), sep="/")
    return {path: flat[path] for path in wanted}

  out = {path: places[path] for path in wanted} if places else None
  made = jax.jit(leaves, out_shardings=out)
  key = jax.random.key(config.train.seed)
  result: dict[str, jax.Array] = made(key)
  return result


def open_init(config: config_lib.Config, expected: dict[str, Any]) -> Leaves:
  """Opens the checkpoints that `config.init` names, and checks that each part is complete.

  `expected` has the shape of each parameter of the model by path. Returns the parameters by path,
  still in their files.

  Raises: ConfigError when `config.init` names both a checkpoint and parts; FormatError that lists
    missing and mis-shaped parameters.
  """
  init = config.init
  if init.checkpoint and (init.language_model or init.vision_tower):
    raise config_lib.ConfigError(
      "config.init: a checkpoint brings its own base; leave out language_model and vision_tower"
    )
  found: Leaves = {}
  problems: list[str] = []
  if init.checkpoint:
    leaves = _floats(finished(init.checkpoint, "init.checkpoint"))
    fit(leaves, {p: s for p, s in expected.items() if p in leaves}, problems)
    refuse(f"init.checkpoint {init.checkpoint}", problems)
    return leaves
  for part in ("language_model", "vision_tower"):
    path = getattr(init, part)
    if not path:
      continue
    leaves = _open_part(path, part, config)
    wanted = {
      p: s for p, s in expected.items() if p.startswith(part + "/") and not re.match(ADAPTERS, p)
    }
    fit(leaves, wanted, problems)
    refuse(f"init.{part} {path}", problems)
    found |= leaves
  return found


def _open_part(path: str, part: str, config: config_lib.Config) -> Leaves:
  """Opens one part of a checkpoint of this package or of a torch folder."""
  if is_ours(path):
    leaves = _floats(finished(path, f"init.{part}"))
  else:
    options = formats.Options(select_layer=config.model.tower.select_layer)
    source = formats.open_checkpoint(path, options)
    _same_sizes(path, part, source.config.model, config.model)
    leaves = source.leaves
  return {p: leaf for p, leaf in leaves.items() if p.startswith(part + "/")}


# Settings that may differ, because they change none of the values of a part.
_FREE = (".initializer_range", ".max_positions", ".layers", ".select_layer")


def _same_sizes(
  path: str, part: str, theirs: config_lib.ModelConfig, ours: config_lib.ModelConfig
) -> None:
  """Raises ConfigError where the settings of a torch folder contradict the config."""
  group = {"language_model": "language_model", "vision_tower": "tower"}[part]
  lines = config_lib.differences(getattr(ours, group), getattr(theirs, group), f"model.{group}")
  free = _FREE if part == "vision_tower" else _FREE[:2]
  lines = [line for line in lines if not line.split(":")[0].endswith(free)]
  if lines:
    raise config_lib.ConfigError(
      f"init.{part} {path} contradicts the config ('here' is the config, 'there' the folder):\n  "
      + "\n  ".join(lines)
    )
