"""Describes the folder that `--format huggingface` writes, and reads it back.

transformers opens it with the code that the folder brings (`remote_code`), whatever the variant. The
config has the variant's whole row, so that code has no table of variants.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import huggingface_keys, keys, projector_names, tables
from llava_sp_jax.convert.keys import Json
from llava_sp_jax.convert.processors import PROCESSOR_FILES, RESAMPLE
from llava_sp_jax.convert.settings import read_json
from llava_sp_jax.convert.torch_io import FormatError, Tensors
from llava_sp_jax.models import build
from llava_sp_jax.models.projector import VARIANTS
from llava_sp_jax.models.spatial import DETAIL_STRIDE, detail_size

NAME = "huggingface"  # the row of formats that are read, and of those that are written
PREFIX = "model.multi_modal_projector."
PROCESSOR_FILE = PROCESSOR_FILES[1]


def row(model: config_lib.ModelConfig) -> Json:
  """Returns the variant of a model's projector as the group `projector` of config.json."""
  name, sizes = model.projector.variant, build.view_sizes(model)
  variant = VARIANTS[name]
  field = variant.detail_field(build.patch_grid(model), sizes) if variant.detail_kernels else 0
  return {
    "variant": name,
    "views": list(variant.views),
    "scales": list(sizes),
    "extractor": variant.extractor,
    "token_width": model.projector.token_width,
    "out_bias": variant.out_bias,
    "detail_kernels": list(variant.detail_kernels),
    "detail_sizes": [detail_size(kernel, field) for kernel in variant.detail_kernels],
    "detail_values": list(variant.detail_values or variant.detail_kernels),
    "detail_field": field,
    "detail_stride": DETAIL_STRIDE,
    "detail_merge": variant.detail_merge,
    "detail_as_tokens": variant.detail_as_tokens,
  }


def spatial_tokens(model: config_lib.ModelConfig) -> int:
  """Returns the number of spatial tokens of one tile."""
  return build.image_token_count(model) - build.patch_grid(model) ** 2


def projector_rules(
  variant: str, channels: int, sizes: tuple[int, ...]
) -> tuple[tables.NameRule, ...]:
  """Returns the rules of `projector_names.projector`, with the names that the folder has."""
  return tuple(
    dataclasses.replace(rule, torch=PREFIX + projector_names.name_of(rule.path))
    for rule in projector_names.projector(variant, channels, sizes)
  )


def original_names(
  tensors: Tensors, variant: str, channels: int, sizes: tuple[int, ...]
) -> Tensors:
  """Returns tensors of a folder with those of the projector renamed as the original's are."""
  rules = projector_rules(variant, channels, sizes)
  targets = tables.by_path(projector_names.projector(variant, channels, sizes))
  result: Tensors = {}
  for name, tensor in tensors.items():
    if found := tables.match(name, rules):
      name = targets[found.path].name.replace("{layer}", str(found.layer))
    result[name] = tensor.renamed(name)
  return result


def note(said: Json, origin: str, tower: config_lib.TowerConfig, allow_unknown: bool) -> Json:
  """Returns what a config.json says as `catalog.NOTE` says it: variant, scales, template.

  Args:
    said: the honored keys of config.json.
    origin: the file, for messages.
    tower: the sizes of the vision tower.
    allow_unknown: whether keys that no table has are ignored.

  Raises: FormatError for keys that are wrong; ConfigError for an unknown variant.
  """
  group = keys.read(
    said.get("projector", {}), huggingface_keys.PROJECTOR, f"{origin}: projector", allow_unknown
  )
  name = group.get("variant", "none")
  variant = config_lib.lookup(f"{origin}: projector.variant", name, VARIANTS)
  grid, sizes = tower.image_size // tower.patch_size, tuple(group.get("scales", ()))
  own = () if not variant.views or grid < variant.parts else variant.scales(grid)
  try:
    variant.scales(grid, sizes)
  except ValueError as error:
    raise FormatError(f"{origin}: projector: {error}") from None
  return {
    "variant": name,
    "scales": () if sizes == own else sizes,
    "sizes": sizes,
    "template": said.get("conversation_template", ""),
    "base_dtype": said.get("base_dtype", ""),
  }


def check(said: Json, model: config_lib.ModelConfig, origin: str) -> None:
  """Compares config.json with the model that was made of it; `said` are its honored keys.

  Raises: FormatError with every value that this package's variant has otherwise.
  """
  wanted: dict[str, Any] = {f"projector.{key}": value for key, value in row(model).items()}
  del wanted["projector.token_width"]  # tensors decide
  wanted |= {"num_spatial_tokens": spatial_tokens(model), "image_newline": model.image_newline}
  found = {f"projector.{key}": value for key, value in said.get("projector", {}).items()} | said
  odd = [
    f"{key} is {found[key]!r:.60}, but {value!r:.60} is computed here"
    for key, value in wanted.items()
    if key in found and found[key] != value
  ]
  if odd:
    raise FormatError(
      f"{origin}: variant {model.projector.variant!r} is another one there: {'; '.join(odd)}"
    )


def images(said: Json, folder: Path, tower: config_lib.TowerConfig, allow_unknown: bool) -> Json:
  """Returns how images are prepared, as keys of `config.DataConfig`.

  Args:
    said: the honored keys of config.json.
    folder: where processor_config.json is.
    tower: the sizes of the vision tower.
    allow_unknown: whether keys that no table has are ignored.

  Raises: FormatError for settings that are missing, unknown, or contradict config.json.
  """
  path = folder / PROCESSOR_FILE
  outer = keys.read(read_json(path), huggingface_keys.PROCESSOR, str(path), allow_unknown)
  inner = keys.read(
    outer.get("image_processor"), huggingface_keys.IMAGES, f"{path}: image_processor", allow_unknown
  )
  side = tower.image_size
  pairs = (
    ("patch_size", outer.get("patch_size"), tower.patch_size),
    ("size", inner.get("size"), {"height": side, "width": side}),
    *((key, outer.get(key), said.get(key)) for key in ("num_spatial_tokens", "patch_merge_type")),
    *(
      (key, inner.get(key), said.get(key)) for key in ("image_aspect_ratio", "image_grid_pinpoints")
    ),
  )
  odd = [f"{key} is {a!r:.60}, expected {b!r:.60}" for key, a, b in pairs if a != b]
  lacking = [
    key for key in ("image_fit", "resample", "image_mean", "image_std") if key not in inner
  ]
  odd += [f"{key} is missing" for key in lacking]
  if odd:
    raise FormatError(f"{path}: does not fit config.json: {'; '.join(odd)}")
  result: Json = {
    "image_aspect": inner["image_aspect_ratio"],
    "image_fit": inner["image_fit"],
    "image_resample": RESAMPLE[inner["resample"]],
    "image_mean": tuple(float(v) for v in inner["image_mean"]),
    "image_std": tuple(float(v) for v in inner["image_std"]),
    "patch_merge": outer["patch_merge_type"],
  }
  if inner["image_grid_pinpoints"]:
    result["grid_pinpoints"] = tuple((w, h) for h, w in inner["image_grid_pinpoints"])
  return result
