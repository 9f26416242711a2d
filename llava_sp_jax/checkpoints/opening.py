"""Opens checkpoints: runs of ours, what `convert` wrote, and folders of others.

Leaves stay in their files until they are placed; nothing missing, unexpected or mis-shaped gets
past, and every problem is named at once.
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

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import fingerprints, manager, on_disk, runs, stream
from llava_sp_jax.checkpoints.initial import _abstract, _open_init, _random
from llava_sp_jax.convert import formats, places, quantised
from llava_sp_jax.convert.leaves import Cast, Leaf, Leaves, fit, in_memory, refuse
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.models import build
from llava_sp_jax.models.quantize import is_quantised

ADAPTERS = r"language_model/.*/lora_[ab]$"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A folder of ours as it stands on disk: a training run, or what `convert` wrote."""

  folder: Path
  config: config_lib.Config
  leaves: Leaves  # all of the model, or of the parts that were converted
  step: int
  fingerprint: str  # of the frozen base
  about: dict[str, Any]
  originals: Leaves  # the same before the kernels of its base were quantised

  @property
  def tokenizer(self) -> Path | None:
    path = self.folder / "tokenizer"
    return path if path.is_dir() else None

  def params(self) -> dict[str, np.ndarray]:
    """All leaves read, flat."""
    return {path: leaf.read() for path, leaf in self.leaves.items()}


def is_ours(folder: str | Path) -> bool:
  """Whether a folder is one that `open_own` opens."""
  place = Path(folder)
  return (place / runs.CONFIG_FILE).is_file() and (place / "checkpoints").is_dir()


def located(config: config_lib.Config, folder: str | Path) -> config_lib.Config:
  """The config of a run with `init` as it is reached from here.

  A relative path was seen from where training ran: this folder, or one that the run lies in.
  """

  def place(path: str) -> str:
    if not path or Path(path).exists():
      return path
    seen = (above / path for above in Path(folder).absolute().parents)
    return next((str(there) for there in seen if there.exists()), path)

  init = {name: place(path) for name, path in dataclasses.asdict(config.init).items()}
  return dataclasses.replace(config, init=config_lib.Init(**init))


def open_own(folder: str | Path, verify: bool = True) -> Checkpoint:
  """The latest checkpoint: what was trained, over the base that its config names.

  `verify` reads all values: a step whose trained parameters are not what was saved is named, and
  the one before it is opened. Raises: CheckpointError without such a step, and when the base is
  another one than it was trained with.
  """
  config = located(runs.read_config(folder), folder)
  place, about, step = on_disk.saved(folder, functools.partial(_check_trained, verify=verify))
  trained = stream.Item(place).leaves()
  form = build.quantisation(config.model)
  expected = _abstract(build.unquantised(config.model))
  parts = about.get("parts", list(formats.PARTS))
  expected = {p: s for p, s in expected.items() if p.split("/")[0] in parts}
  base = {p: leaf for p, leaf in _open_init(config, expected).items() if p not in trained}
  missing = {p: s for p, s in expected.items() if p not in trained and p not in base}
  base |= in_memory({p: np.asarray(a) for p, a in _random(config, missing).items()})
  problems: list[str] = []
  fit({**base, **trained}, expected, problems)
  refuse(str(folder), problems)
  originals: Leaves = {**base, **trained}
  if form:
    base = quantised.quantise(base, _abstract(config.model), form)
  if verify:
    found = fingerprints.fingerprint(_AsFrozen(base, config.model.frozen_dtype))
    if found != about["fingerprint"]:
      raise CheckpointError(
        f"{folder}: its frozen base has fingerprint {about['fingerprint']}, but config.init leads "
        f"to {found}; restore the files that config.init names"
      )
  frozen = {p: _cast(leaf, config.model.frozen_dtype) for p, leaf in base.items()}
  leaves: Leaves = {**frozen, **trained}
  return Checkpoint(
    Path(folder), config, leaves, step, about["fingerprint"], about, originals if form else leaves
  )


def _check_trained(place: Path, about: dict[str, Any], verify: bool) -> None:
  """Opens the parameters of a step, and compares them with its checksums, if it has any.

  They are read leaf by leaf, and so once more when they are used; moments are not read.

  Raises: CheckpointError.
  """
  known = on_disk.checksums(place).get("params", {})

  def read() -> None:
    leaves = stream.Item(place / "params").leaves()
    for path, leaf in leaves.items() if verify and known else ():
      found = fingerprints.sums({path: jax.numpy.asarray(leaf.read())})
      fingerprints.compare_sums(found, known, place)

  manager.told(f"{place}: cannot be read", read)


class _AsFrozen(Mapping[str, Any]):
  """Leaves read one at a time, as the model holds them when they do not learn."""

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
  as_it_is = leaf.dtype == wanted or is_quantised(leaf.path)
  return leaf if as_it_is else Cast(leaf.path, leaf.shape, wanted, leaf)


def open_any(path: str | Path, options: formats.Options, verify: bool = True) -> formats.Source:
  """A checkpoint of ours or of any format in. Raises: CheckpointError, FormatError.

  Without `verify` no values are read, and the base of a run of ours is taken as it is.

  A base that was quantised for training comes as the floats that its codes stand for: they are what
  adapters were trained on, and what a merged model must hold to answer alike. Adapters alone go
  with the original base when `options.base` names it.
  """
  if not is_ours(path):
    return formats.open_checkpoint(path, options)
  own = open_own(path, verify)
  parts = tuple(p for p in formats.PARTS if any(q.startswith(p + "/") for q in own.leaves))
  form = build.quantisation(own.config.model)
  model = build.unquantised(own.config.model)
  source = formats.Source(
    "llava_sp_jax", dataclasses.replace(own.config, model=model),
    quantised.dequantise(own.leaves, form, model.frozen_dtype), parts, own.tokenizer,
    base=options.base or places.reachable(own.about.get("base", "")),
    tower=options.tower or places.reachable(own.about.get("tower", "")),
    fingerprint=own.fingerprint,
  )  # fmt: skip
  if not form or not verify:
    return source
  named = dataclasses.replace(source, leaves=own.originals) if source.base else source
  return dataclasses.replace(source, fingerprint=base_fingerprint(named))


def base_fingerprint(source: formats.Source) -> str:
  """Reads all that stage 2 does not train: tower and decoder without adapters."""
  base = {p: leaf for p, leaf in source.leaves.items()
          if not p.startswith("projector/") and not re.match(ADAPTERS, p)}  # fmt: skip
  return fingerprints.fingerprint(_AsFrozen(base, source.config.model.frozen_dtype))


def verify_base(source: formats.Source) -> None:
  """Reads the base of an exported adapter and compares it with the one it was trained on.

  Raises: FormatError when it is another one.
  """
  if not source.fingerprint or source.format == "llava_sp_jax":
    return
  found = base_fingerprint(source)
  if found != source.fingerprint:
    raise FormatError(
      f"the adapter was trained on a base with fingerprint {source.fingerprint}, but base and "
      f"tower here ({source.base}, {source.tower}) have {found}; name the right ones with --base "
      "and --tower"
    )


def finished(folder: str | Path, key: str) -> Checkpoint:
  """`open_own` of a run that reached its last step. Raises: CheckpointError."""
  run = open_own(folder)
  if run.step < run.config.train.steps:
    raise CheckpointError(
      f"{key} {folder}: stopped at step {run.step} of {run.config.train.steps}; finish it first"
    )
  return run
