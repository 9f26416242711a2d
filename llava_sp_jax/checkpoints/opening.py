"""Opens checkpoints of any format, and compares them with their base."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from llava_sp_jax.checkpoints import fingerprints
from llava_sp_jax.checkpoints.own_folders import (
  ADAPTERS,
  AsFrozen,
  is_ours,
  open_own,
)
from llava_sp_jax.convert import formats, quantized
from llava_sp_jax.convert.loaded import OURS, Loaded
from llava_sp_jax.convert.torch_io import FormatError
from llava_sp_jax.models import build


def open_any(path: str | Path, options: formats.Options, verify: bool = True) -> Loaded:
  """Opens a checkpoint of this package or of any foreign format.

  Without `verify`, no values are read, and the base of a run is not compared with its fingerprint.

  A base that was quantized for training is returned as the floats that its codes stand for.
  Adapters were trained on those, so a merged model needs them to give the same answers.
  `fingerprint` is that of the original base if the run or `options.base` names one, for an export
  of adapters alone.

  Raises:
    CheckpointError: for a run without a usable checkpoint, or with another base than it was trained
      on.
    FormatError: for a foreign folder of no known format, or with missing or unexpected tensors.
  """
  if not is_ours(path):
    return formats.open_checkpoint(path, options)
  own = open_own(path, verify)
  form = build.quantization(own.config.model)
  model = build.unquantized(own.config.model)
  source = dataclasses.replace(
    own,
    config=dataclasses.replace(own.config, model=model),
    leaves=quantized.dequantize(own.leaves, form, model.frozen_dtype),
    base=options.base or own.base,
    tower=options.tower or own.tower,
  )
  if not form or not verify:
    return source
  named = dataclasses.replace(source, leaves=own.originals or {}) if source.base else source
  return dataclasses.replace(source, fingerprint=base_fingerprint(named))


def base_fingerprint(source: Loaded) -> str:
  """Returns the hash of tower and decoder, without adapters, in the dtype of frozen parameters.

  Reads all of their values. The hash is that of `fingerprints.fingerprint`.
  """
  base = {
    p: leaf
    for p, leaf in source.leaves.items()
    if not p.startswith("projector/") and not re.match(ADAPTERS, p)
  }
  return fingerprints.fingerprint(AsFrozen(base, source.config.model.frozen_dtype))


def verify_base(source: Loaded) -> None:
  """Reads the base of an exported adapter and compares it with the one it was trained on.

  Does nothing for a run folder, or if the export records no fingerprint.

  Raises: FormatError when their fingerprints differ.
  """
  if not source.fingerprint or source.format == OURS:
    return
  found = base_fingerprint(source)
  if found != source.fingerprint:
    raise FormatError(
      f"the adapter was trained on a base with fingerprint {source.fingerprint}, but base and "
      f"tower here ({source.base}, {source.tower}) have {found}; name the right ones with --base "
      "and --tower"
    )
