"""Opens checkpoints of foreign formats.

`open_checkpoint` opens every file that a checkpoint of the table `catalog.FORMATS` needs, and
checks all names, shapes and settings at once. It returns a `Loaded`, of which no value has been
read yet.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from flax.traverse_util import flatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import (
  adapters,
  detect,
  gguf,
  huggingface,
  key_tables,
  keys,
  leaves,
  places,
  processors,
  settings,
  settings_out,
  torch_io,
  weights,
)
from llava_sp_jax.convert.catalog import (
  FORMATS,
  NOTE,
  PARTS,
  Folder,
  identify,
  look,
  rename,
)
from llava_sp_jax.convert.keys import Json
from llava_sp_jax.convert.leaves import Leaves
from llava_sp_jax.convert.loaded import Loaded, is_adapter
from llava_sp_jax.convert.places import copy_tokenizer
from llava_sp_jax.convert.tensor import alike
from llava_sp_jax.convert.torch_io import FormatError, Tensors
from llava_sp_jax.data import anyres, conversation
from llava_sp_jax.models import build
from llava_sp_jax.models.projector import VARIANTS

__all__ = ["FORMATS", "NOTE", "PARTS", "Options", "copy_tokenizer",
           "identify", "look", "open_checkpoint"]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
  """Holds what a checkpoint may not say itself; empty means as the checkpoint says."""

  base: str = ""
  tower: str = ""
  variant: str = ""
  template: str = ""
  select_layer: int = 0  # for a tower alone; 0 means LLaVA's -2
  allow_unknown: bool = False  # whether to ignore keys of settings files that no table has


def open_checkpoint(path: str | Path, options: Options = Options()) -> Loaded:
  """Opens a checkpoint of FORMATS, with the base and tower that it needs.

  `path` is a folder, a file or the name of a repository on the Hugging Face hub.

  Raises: FormatError that lists all that is missing, unexpected, mis-shaped or contradictory;
    ConfigError for settings that no config may have.
  """
  if options.template:
    config_lib.lookup("--template", options.template, conversation.TEMPLATES)
  folder = look(places.local(str(path)))
  name = identify(folder)
  row, opened = FORMATS[name], _open(folder, name, options)
  tensors, parts, llm = opened.tensors, opened.parts, opened.llm
  data: Json = {}
  tower = config_lib.TowerConfig()
  if "vision_tower" in parts:
    tower, towers, data = _open_tower(opened, options)
    tensors = {**towers, **tensors}
  if opened.recipe:
    tensors = adapters.fold(tensors, opened.recipe)
  llm, tensors = _tied(llm, tensors)
  said = _note(folder, opened, tower, options)
  if name == huggingface.NAME:
    tensors = huggingface.original_names(tensors, said["variant"], tower.width, said["sizes"])
  model = config_lib.ModelConfig(
    tower=tower,
    language_model=llm or config_lib.LanguageModelConfig(),
    lora=opened.recipe.lora if opened.recipe else config_lib.LoraConfig(),
    projector=config_lib.ProjectorConfig(variant="none"),
    image_newline="model.image_newline" in tensors,
  )
  problems: list[str] = []
  if "projector" in parts:
    model = detect.with_projector(
      model,
      tensors,
      options.variant or said.get("variant", ""),
      str(folder.path),
      scales=() if options.variant else tuple(said.get("scales", ())),
    )
  if name == huggingface.NAME:
    huggingface.check(opened.said, model, f"{folder.path}/config.json")
  found = leaves.gather(tensors.values(), weights.names_of(model, parts), problems)
  found = weights.used_layers(found, model)
  expected = {
    p: s
    for p, s in flatten_dict(build.abstract(model), sep="/").items()
    if p.split("/")[0] in parts
  }
  leaves.fit(found, expected, problems)
  leaves.refuse(f"{folder.path} ({row.what})", problems)
  kind = _dtype(found)
  model = dataclasses.replace(model, dtype=kind, frozen_dtype=kind)
  if said.get("base_dtype"):
    model = dataclasses.replace(model, frozen_dtype=said["base_dtype"])
  data["template"] = options.template or said.get("template") or _template(opened)
  if "tokenizer_model_max_length" in opened.said:
    data["row_length"] = opened.said["tokenizer_model_max_length"]
  config = config_lib.Config(
    name=folder.path.stem if name == "gguf" else folder.path.name,
    model=model,
    data=config_lib.DataConfig(**data),
    train=config_lib.TrainConfig(steps=0),
  )
  tokenizer = None
  if "language_model" in parts:  # the tokenizer of a tower alone is not used
    places.check_settings(opened.folders, options.allow_unknown)
    tokenizer = next((p for p in opened.folders if places.has_tokenizer(p)), None)
  return Loaded(
    name,
    checked(folder.path, config, parts),
    found,
    parts,
    tokenizer,
    base=options.base or _base_name(folder, opened.recipe),
    tower=options.tower or opened.said.get("mm_vision_tower") or "",
    fingerprint=said.get("base_fingerprint", ""),
  )


def _tied(
  llm: config_lib.LanguageModelConfig | None, tensors: Tensors
) -> tuple[config_lib.LanguageModelConfig | None, Tensors]:
  """Drops one of embedding and output layer if the settings tie them.

  If both are there and differ, the settings are changed to untied.
  """
  head, embedding = tensors.get(adapters.HEAD), tensors.get(adapters.EMBEDDING)
  if llm is None or not llm.tie_embeddings or head is None:
    return llm, tensors
  if embedding is not None and not alike(head, embedding):
    return dataclasses.replace(llm, tie_embeddings=False), tensors
  rest = {name: tensor for name, tensor in tensors.items() if name != adapters.HEAD}
  return llm, {adapters.EMBEDDING: head.renamed(adapters.EMBEDDING), **rest}


def checked(path: Path, config: config_lib.Config, parts: tuple[str, ...]) -> config_lib.Config:
  """Returns the config of the checkpoint at `path` as it will be read back from JSON.

  Raises: ConfigError for settings of which no model can be built.
  """
  try:
    read = config_lib.from_json(config_lib.to_json(config))
    build.model(read.model)
    if "projector" in parts:
      anyres.Reader(read.data, anyres.Tile(*build.tile_shape(read.model)))
  except config_lib.ConfigError as error:
    raise config_lib.ConfigError(f"{path}: {error}") from None
  return read


@dataclasses.dataclass(frozen=True)
class _Opened:
  """Holds a folder's tensors under the names of `tables`, with those of its base."""

  tensors: Tensors
  parts: tuple[str, ...]
  folders: tuple[Path, ...]  # the folder, then its base
  config: Json  # the config.json that says what the model is
  home: Path  # the folder of that config.json
  said: Json  # its LLaVA settings
  llm: config_lib.LanguageModelConfig | None = None
  recipe: adapters.Recipe | None = None
  names: tuple[str, ...] = ()  # names of the decoder in its files


def _note(folder: Folder, opened: _Opened, tower: config_lib.TowerConfig, options: Options) -> Json:
  """Returns what a folder says of itself beyond what the original's files say, with known names."""
  if folder.config.get("model_type") == settings.OWN:
    origin = f"{folder.path}/config.json"
    said = huggingface.note(opened.said, origin, tower, options.allow_unknown)
  else:
    origin = str(folder.path / NOTE)
    said = settings.read_json(folder.path / NOTE) if (folder.path / NOTE).is_file() else {}
    said = {config_lib.FORMER_NAMES.get(key, key): value for key, value in said.items()}
    said = keys.read(said, key_tables.NOTE, origin, options.allow_unknown)
  for key, known in (("variant", VARIANTS), ("template", conversation.TEMPLATES)):
    if said.get(key):
      config_lib.lookup(f"{origin}: {key}", said[key], known)
  return said


def _open(folder: Folder, name: str, options: Options) -> _Opened:
  """Reads a folder's settings, then the names and shapes of its tensors, but no values."""
  row, path, allow = FORMATS[name], folder.path, options.allow_unknown
  if name == "gguf":
    llm = settings.language_model(gguf.config(path, allow), str(path), allow)
    return _Opened(gguf.open_gguf(path), row.parts, (path,), {}, path, {}, llm)
  origin = f"{path}/config.json"
  said = settings.llava(folder.config, origin, allow)
  own, names = None, []
  if "language_model" in row.parts and folder.config:
    values = settings.decoder(folder.config)
    own = settings.language_model(values, origin, allow)
    names = [
      values.get("model_type"),
      values.get("_name_or_path"),
      folder.config.get("_name_or_path"),
    ]
  if name == "peft":
    adapters.refuse_unfinished(path, folder.files, settings.is_llava(folder.config))
  recipe = adapters.recipe(path, allow)
  base = _open_base(folder, recipe, options) if row.base else None
  tensors = weights.named(folder, row)
  hints = tuple(n for n in (*names, _base_name(folder, recipe)) if n)
  if base is None:
    return _Opened(tensors, row.parts, (path,), folder.config, path, said, own, recipe, hints)
  text = base.llm
  if text and (rows := tensors.get(adapters.EMBEDDING)) and rows.shape:  # its own embedding
    text = dataclasses.replace(text, vocab_size=rows.shape[0])
  _same_decoder(own, text, base.folders[0], path)
  if recipe and text:
    tensors = adapters.place(
      tensors, base.tensors, recipe, text.layers, lambda module: rename(module, row.renames)
    )
    if text.tie_embeddings:
      tensors |= adapters.untied(tensors, base.tensors, recipe)
  mine = bool(said) or not base.said
  return _Opened(
    {**base.tensors, **tensors},
    tuple(p for p in PARTS if p in row.parts or p in base.parts),
    (path, *base.folders),
    folder.config if mine else base.config,
    path if mine else base.home,
    said if mine else base.said,
    text,
    recipe,
    hints + base.names,
  )


def _open_base(folder: Folder, recipe: adapters.Recipe | None, options: Options) -> _Opened:
  """Opens the base of a folder that has no decoder of its own."""
  named = options.base or _base_name(folder, recipe)
  place = look(places.resolve(named, folder.path, "--base"))
  name = identify(place)
  if name not in ("language_model", "gguf", "llava", "llava_hf"):
    raise FormatError(
      f"{place.path}: expected the base of {folder.path}, a language model or a merged LLaVA, "
      f"found {FORMATS[name].what}"
    )
  return _open(place, name, options)


def _same_decoder(
  own: config_lib.LanguageModelConfig | None,
  llm: config_lib.LanguageModelConfig | None,
  base: Path,
  path: Path,
) -> None:
  """Raises FormatError where a folder's sizes contradict those of its base."""
  if not own or not llm:
    return
  odd = config_lib.differences(llm, own, "language_model")
  odd = [line for line in odd if "initializer_range" not in line]
  if odd:
    listed = "\n  ".join(odd)
    raise FormatError(
      f"{base} is not the base of {path} ('here' is the base, 'there' is what "
      f"{path}/config.json says):\n  {listed}\nGive the right one with --base."
    )


def _base_name(folder: Folder, recipe: adapters.Recipe | None) -> str:
  said = recipe.said.get("base_model_name_or_path") if recipe else ""
  return said or folder.config.get("_name_or_path") or ""


def _template(opened: _Opened) -> str:
  """Returns LLaVA's template v1, unless the name of the decoder suggests another one.

  Raises: FormatError in that case.
  """
  if "projector" not in opened.parts or not opened.llm:
    return "v1"
  family = settings_out.family(opened.llm)
  names = list(opened.names) if family == "llama" else [*opened.names, family]
  other = settings.other_template(names)
  if other is None:
    return "v1"
  name, choice = other
  hint = f" (the original takes {choice} for it)" if choice else ""
  raise FormatError(
    f"{opened.folders[0]}: does not say which conversation template it was trained with, and its "
    f"decoder is {name!r}{hint}; name the template with --template"
  )


def _open_tower(opened: _Opened, options: Options) -> tuple[config_lib.TowerConfig, Tensors, Json]:
  """Returns the tower's sizes, its tensors, and how images are prepared for it.

  There are no tensors if the checkpoint itself brings them.
  """
  config, origin, allow = opened.config, f"{opened.home}/config.json", options.allow_unknown
  layer = options.select_layer or settings.select_layer(opened.said, origin)
  alone = config.get("model_type") in (*settings.TOWERS, *settings.OTHER_TOWERS)
  inside = any(name.startswith("vision_model.") for name in opened.tensors)
  if alone or ("vision_config" in config and not options.tower):
    path, values = opened.home, config
  else:
    named = options.tower or opened.said.get("mm_vision_tower") or ""
    path = places.resolve(named, opened.home, "--tower")
    values = settings.read_json(path / "config.json")
    origin = f"{path}/config.json"
  tower = settings.tower(values, origin, layer, allow)
  found: Tensors = {}
  if path != opened.home and (not inside or torch_io.find(path, torch_io.WEIGHTS)):
    found = weights.named(look(path), FORMATS["vision_tower"])
  if config.get("model_type") == settings.OWN:
    return tower, found, huggingface.images(opened.said, opened.home, tower, allow)
  data = processors.images(config, path, opened.home, tower, allow, alone=alone)
  return tower, found, data


def _dtype(found: Leaves) -> str:
  """Returns the dtype of computation and of frozen parameters.

  It is float32 if the largest array of the base is float32, else bfloat16.
  """
  base = [leaf for p, leaf in found.items() if not p.startswith("projector/") and not is_adapter(p)]
  largest = max(base, key=lambda leaf: leaf.nbytes)
  return "float32" if largest.dtype.itemsize >= 4 else "bfloat16"
