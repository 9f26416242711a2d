"""The door for checkpoints of others.

`open_checkpoint` opens every file that a checkpoint of the table `catalog.FORMATS` needs, checks all
names, shapes and settings at once, and returns a `Source`: a checkpoint that is understood, of which
no value has been read yet.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import detect, gguf, leaves, places, settings, tables, torch_io
from llava_sp_jax.convert.catalog import (
  FORMATS,
  NOTE,
  PARTS,
  Folder,
  Format,
  Renames,
  identify,
  look,
)
from llava_sp_jax.convert.leaves import Leaves
from llava_sp_jax.convert.places import copy_tokenizer
from llava_sp_jax.convert.torch_io import FormatError, Tensors
from llava_sp_jax.models import build

__all__ = ["FORMATS", "NOTE", "PARTS", "Options", "Source", "cast", "copy_tokenizer",
           "identify", "is_adapter", "look", "open_checkpoint"]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
  """What a checkpoint may not say itself; empty means: as the checkpoint says."""

  base: str = ""
  tower: str = ""
  row: str = ""
  template: str = ""
  select_layer: int = 0  # of a tower alone; 0: LLaVA's -2


@dataclasses.dataclass(frozen=True)
class Source:
  """A checkpoint that fits its model; `leaves` are still in their files."""

  format: str  # a row of FORMATS, or "llava_sp_jax"
  config: config_lib.Config
  leaves: Leaves
  parts: tuple[str, ...]
  tokenizer: Path | None
  base: str = ""  # name or folder of the language model that the adapters were trained on
  tower: str = ""  # name or folder of the vision tower
  fingerprint: str = ""  # of the frozen base, where the checkpoint says it

  def part(self, name: str, *, adapters: bool = False) -> Leaves:
    """The leaves of one part, or its adapters."""
    return {p: leaf for p, leaf in self.leaves.items()
            if p.startswith(name + "/") and is_adapter(p) == adapters}  # fmt: skip


def is_adapter(path: str) -> bool:
  return path.rsplit("/", 1)[-1] in ("lora_a", "lora_b")


def cast(source: Source, dtype: str) -> Source:
  """The same model with every leaf in one dtype."""
  wanted = np.dtype(jnp.dtype(dtype))
  cast_leaves: Leaves = {
    p: leaves.Cast(p, leaf.shape, wanted, leaf) for p, leaf in source.leaves.items()
  }
  model = dataclasses.replace(source.config.model, frozen_dtype=dtype)
  config = dataclasses.replace(source.config, model=model)
  return dataclasses.replace(source, leaves=cast_leaves, config=config)


def open_checkpoint(path: str | Path, options: Options = Options()) -> Source:
  """Opens any checkpoint of FORMATS with the base and tower it needs.

  Raises: FormatError that lists all that is missing, unexpected, mis-shaped or contradictory.
  """
  folder = look(Path(path))
  name = identify(folder)
  row = FORMATS[name]
  tensors, llm, base = _open_language(folder, row, options)
  tower_folder, tower = None, config_lib.Tower()
  if "vision_tower" in row.parts:
    tower_folder, tower, towers = _open_tower(folder, tensors, options)
    tensors = {**towers, **tensors}
  adapter = folder.path / "adapter_config.json"
  lora = _lora(settings.read_json(adapter), adapter) if adapter.is_file() else config_lib.Lora()
  note = folder.path / NOTE
  said = settings.read_json(note) if note.is_file() else {}
  model = config_lib.Model(
    tower=tower, language_model=llm or config_lib.LanguageModel(), lora=lora,
    projector=config_lib.Projector(row="none"),
    image_newline="model.image_newline" in tensors,
  )  # fmt: skip
  problems: list[str] = []
  if llm and llm.tie_embeddings:
    tensors.pop("lm_head.weight", None)  # torch does not use it either
  if "projector" in row.parts:
    model = detect.with_projector(
      model, tensors, options.row or said.get("row", ""), str(folder.path)
    )
  found = leaves.gather(tensors.values(), _names(model, row.parts), problems)
  found = _used_layers(found, model)
  expected = {p: s for p, s in flatten_dict(build.abstract(model), sep="/").items()
              if p.split("/")[0] in row.parts}  # fmt: skip
  leaves.fit(found, expected, problems)
  leaves.refuse(f"{folder.path} ({row.what})", problems)
  kind = _dtype(found)
  model = dataclasses.replace(model, dtype=kind, frozen_dtype=kind)
  if said.get("base_dtype"):
    model = dataclasses.replace(model, frozen_dtype=said["base_dtype"])
  data = settings.images(folder.config, tower_folder, folder.path) if tower_folder else {}
  data["template"] = options.template or said.get("template", "v1")
  data["row_length"] = folder.config.get("tokenizer_model_max_length", 2048)
  config = config_lib.Config(
    name=folder.path.stem if name == "gguf" else folder.path.name, model=model,
    data=config_lib.Data(**data), train=config_lib.Train(steps=0),
  )  # fmt: skip
  folders = (folder.path, *([base] if base else []))
  tokenizer = next((p for p in folders if places.has_tokenizer(p)), None)
  return Source(
    name, config, found, row.parts, tokenizer, base=options.base or _base_name(folder),
    tower=options.tower or folder.config.get("mm_vision_tower", ""),
    fingerprint=said.get("base_fingerprint", ""),
  )  # fmt: skip


def _open_language(
  folder: Folder, row: Format, options: Options
) -> tuple[Tensors, config_lib.LanguageModel | None, Path | None]:
  """The folder's tensors under our tables' names, with those of its base; sizes; the base."""
  tensors: Tensors = {}
  for stems in row.weights:
    tensors.update(_rename(torch_io.open_named(folder.path, stems), row.renames, folder.path))
  if "language_model" not in row.parts:
    return tensors, None, None
  if folder.path.suffix == ".gguf":
    values = gguf.config(folder.path)
    return gguf.open_gguf(folder.path), settings.language_model(values, str(folder.path)), None
  values = folder.config.get("text_config", folder.config)
  own = settings.language_model(values, f"{folder.path}/config.json") if values else None
  if not row.base:
    return tensors, own, None
  base = places.resolve(options.base or _base_name(folder), folder.path, "--base")
  weights, llm, _ = _open_language(look(base), FORMATS[_language_format(base)], options)
  if own and llm:
    odd = config_lib.differences(llm, own, "language_model")
    odd = [line for line in odd if "initializer_range" not in line]
    if odd:
      listed = "\n  ".join(odd)
      raise FormatError(
        f"{base} is not the base of {folder.path} ('here' is the base, 'there' is what "
        f"{folder.path}/config.json says):\n  {listed}\nGive the right one with --base."
      )
  return {**weights, **tensors}, llm, base


def _language_format(base: Path) -> str:
  name = identify(look(base))
  if name not in ("language_model", "gguf"):
    raise FormatError(f"{base}: expected a base language model, found {FORMATS[name].what}")
  return name


def _base_name(folder: Folder) -> str:
  adapter = folder.path / "adapter_config.json"
  said = settings.read_json(adapter).get("base_model_name_or_path") if adapter.is_file() else ""
  return said or folder.config.get("_name_or_path", "")


def _open_tower(
  folder: Folder, tensors: Tensors, options: Options
) -> tuple[Path, config_lib.Tower, Tensors]:
  """The tower's folder, its sizes, and its tensors unless the checkpoint brings them itself."""
  config = folder.config
  said: Any = config.get("mm_vision_select_layer", config.get("vision_feature_layer", -2))
  layer = options.select_layer or int(said)
  alone = config.get("model_type") in settings.TOWERS
  if alone:
    return folder.path, settings.tower(config, f"{folder.path}/config.json", layer), {}
  if "vision_config" in config and not options.tower:
    return folder.path, settings.tower(folder.config, f"{folder.path}/config.json", layer), {}
  path = places.resolve(
    options.tower or folder.config.get("mm_vision_tower", ""), folder.path, "--tower"
  )  # fmt: skip
  values = settings.read_json(path / "config.json")
  tower = settings.tower(values, f"{path}/config.json", layer)
  inside = any(name.startswith("vision_model.") for name in tensors)
  return path, tower, {} if inside else torch_io.open_named(path, torch_io.WEIGHTS)


def _rename(tensors: Tensors, renames: Renames, origin: Path) -> Tensors:
  """Raises: FormatError when two tensors get one name."""
  result: Tensors = {}
  for name, tensor in tensors.items():
    for pattern, target in renames:
      if re.fullmatch(pattern, name):
        name = re.sub(pattern, target, name)
    if name in result:
      raise FormatError(f"{origin}: two tensors are {name}: {result[name].name}, {tensor.name}")
    result[name] = tensor.renamed(name)
  return result


def _lora(values: Mapping[str, Any], path: Path) -> config_lib.Lora:
  """Raises: FormatError for a recipe of PEFT that the adapters here do not compute."""
  plain = {"bias": "none", "fan_in_fan_out": False, "use_dora": False, "use_rslora": False,
           "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None}  # fmt: skip
  odd = [f"{k}={values[k]!r}" for k, v in plain.items() if values.get(k, v) not in (v, None)]
  if odd:
    raise FormatError(f"{path}: not supported: {', '.join(odd)}")
  return config_lib.Lora(
    rank=values["r"], alpha=float(values["lora_alpha"]), dropout=values.get("lora_dropout", 0.0)
  )


def _names(model: config_lib.Model, parts: tuple[str, ...]) -> tuple[tables.Row, ...]:
  every = {
    "vision_tower": tables.TOWERS[model.tower.variant],
    "projector": tables.projector(
      model.projector.row, model.tower.width, build.view_sizes(model)
    ),
    "language_model": tables.LLAMA + tables.LORA,
  }  # fmt: skip
  return tuple(row for part in parts for row in every[part])


def _used_layers(found: Leaves, model: config_lib.Model) -> Leaves:
  """The tower's blocks up to the selected layer; those after it are never computed."""
  count = build.tower_layers(model)
  result = {}
  for path, leaf in found.items():
    if path.startswith("vision_tower/layers/") and isinstance(leaf, leaves.InTensors):
      leaf = leaf.first_layers(count)
    result[path] = leaf
  return result


def _dtype(found: Leaves) -> str:
  """What to compute in and keep frozen parameters in: float32 where the base is stored in it."""
  base = [leaf for p, leaf in found.items() if not p.startswith("projector/") and not is_adapter(p)]
  largest = max(base, key=lambda leaf: leaf.nbytes)
  return "float32" if largest.dtype.itemsize >= 4 else "bfloat16"
