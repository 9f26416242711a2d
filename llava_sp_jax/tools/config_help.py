"""Describes each key of a config, its meaning and allowed values, for `llava-sp train --help`.

Meanings are the comments beside the fields in config.py, bounds of numbers are those of limits.py,
and allowed names are the rows of the table that the key is looked up in.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax import limits

# key -> (module, table whose rows are its allowed values)
TABLES = {
  "model.tower.variant": ("models.vit", "TOWER_VARIANTS"),
  "model.language_model.rope_scaling.kind": ("models.layers", "ROPES"),
  "model.projector.variant": ("models.projector", "VARIANTS"),
  "model.matmul_precision": ("models.build", "PRECISIONS"),
  "model.quantize": ("models.quantize", "FORMATS"),
  "model.frozen_matmul": ("models.quantized_dense", "PRODUCTS"),
  "model.cache": ("models.cache", "FORMATS"),
  "model.remat": ("models.remat", "POLICIES"),
  "model.attention": ("models.attention", "IMPLEMENTATIONS"),
  "data.source": ("data.sources", "SOURCES"),
  "data.template": ("data.conversation", "TEMPLATES"),
  "data.turns": ("data.conversation", "TURNS"),
  "data.packing": ("data.packing", "PACKINGS"),
  "data.too_long": ("data.samples", "TOO_LONG"),
  "data.augment": ("data.image", "AUGMENTS"),
  "data.image_aspect": ("data.anyres", "ASPECTS"),
  "data.image_fit": ("data.image", "FITS"),
  "data.image_resample": ("data.image", "RESAMPLES"),
  "data.patch_merge": ("data.anyres", "MERGES"),
  "optimizer.stage": ("training.optimizer", "STAGES"),
  "optimizer.moment_dtype": ("training.optimizer", "MOMENT_DTYPES"),
  "train.sinks": ("training.sinks", "SINKS"),
  "evaluate.task": ("tasks.catalog", "TASKS"),
  "mesh.base": ("distributed.sharding", "PRESETS"),
}
BESIDES = {
  "model.attention": ("auto",),
  "data.source": ("auto",),
}  # key -> allowed values that are not rows of its table
FIELD = re.compile(r"  (\w+): .*?  # (.+)")


def fields(values: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
  """Yields (key, default, meaning) for all keys of a config; `prefix` stands before the keys.

  The meaning is "" for a field without a comment.
  """
  comments = meanings(type(values))
  for field in dataclasses.fields(values):
    value, key = getattr(values, field.name), f"{prefix}{field.name}"
    if dataclasses.is_dataclass(value):
      yield from fields(value, f"{key}.")
    else:
      yield key, value, comments.get(field.name, "")


def meanings(cls: type) -> dict[str, str]:
  """Returns {field: comment beside it in the source of a dataclass}."""
  lines = inspect.getsource(cls).splitlines()
  return {match[1]: match[2] for line in lines if (match := FIELD.match(line))}


def allowed(key: str, default: Any) -> str:
  """Returns the allowed values of a key as text; "" if they are not known."""
  if key in TABLES:
    module, table = TABLES[key]
    rows = getattr(importlib.import_module(f"llava_sp_jax.{module}"), table)
    return ", ".join(map(str, (*BESIDES.get(key, ()), *rows)))
  if isinstance(default, bool):
    return "true, false"
  numbers = [number for _, number in limits.numbers(default, key)]
  if numbers or isinstance(default, tuple):
    return str(limits.limit_of(key))
  return ""


def text() -> str:
  """Returns the help on all keys, each a block of flag, default, meaning and allowed values."""
  lines = []
  for key, default, meaning in fields(config_lib.Config()):
    lines.append(f"  --config.{key}={default!r}")
    lines += [f"      {line}" for line in (meaning, allowed(key, default)) if line]
  return "\n".join(lines)
