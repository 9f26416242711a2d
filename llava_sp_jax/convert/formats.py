"""Formats in: a table of what people have, told apart by the files of a folder, never by its name.

`identify` finds the row; `open_checkpoint` opens every file it needs, checks all names, shapes and
settings at once, and returns a `Source`: a checkpoint that is understood, of which no value has
been read yet.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import gguf, leaves, settings, tables, torch_io
from llava_sp_jax.convert.leaves import Leaves
from llava_sp_jax.convert.torch_io import FormatError, Tensors
from llava_sp_jax.models import build
from llava_sp_jax.models.projector import ROWS

PARTS = ("vision_tower", "projector", "language_model")
NOTE = "llava_sp.json"  # what our own exports say of themselves, beside the original's files
Renames = tuple[tuple[str, str], ...]

# Names as they stand in each layout -> the names of `tables`.
PLAIN: Renames = ()
ORIGINAL: Renames = (
  (r"model\.vision_tower\.vision_tower\.(.*)", r"\1"),
  (r"mm_projector\.(.*)", r"model.mm_projector.\1"),
)
LORA_FOLDER: Renames = (
  (r"(.*\.lora_[AB])\.default(\.weight)", r"\1\2"),
  (r"base_model\.model\.(?!.*\.lora_[AB]\.)(.*)", r"\1"),
)
TRANSFORMERS: Renames = (  # the published layout, and the one of transformers >= 4.52
  (r"(?:model\.)?vision_tower\.(.*)", r"\1"),
  (r"(?:model\.)?multi_modal_projector\.linear_1\.(.*)", r"model.mm_projector.0.\1"),
  (r"(?:model\.)?multi_modal_projector\.linear_2\.(.*)", r"model.mm_projector.2.\1"),
  (r"(?:model\.)?image_newline", r"model.image_newline"),
  (r"language_model\.(model\..*|lm_head\..*)", r"\1"),
  (r"model\.language_model\.(.*)", r"model.\1"),
)


@dataclasses.dataclass(frozen=True)
class Folder:
  """A checkpoint's folder (or file) as it is told apart: its files and its config.json."""

  path: Path
  files: frozenset[str]
  config: settings.Json

  def has(self, *stems: str) -> bool:
    return any(name.split(".")[0] in stems for name in self.files if not name.endswith(".json"))


@dataclasses.dataclass(frozen=True)
class Format:
  """One format in. `weights` are the groups of file stems to open, one of each."""

  what: str
  matches: Callable[[Folder], bool]
  weights: tuple[tuple[str, ...], ...]
  parts: tuple[str, ...]
  renames: Renames = PLAIN
  base: bool = False  # the language model's weights are in another folder


def _is_llava(folder: Folder) -> bool:
  return "mm_vision_tower" in folder.config


FORMATS: dict[str, Format] = {
  "gguf": Format("a LLaMA in a GGUF file", lambda f: f.path.suffix == ".gguf", (),
                 ("language_model",)),
  "llava_lora": Format(
    "LoRA folder of LLaVA or LLaVA-SP: adapter and non_lora_trainables, needs its base",
    lambda f: "adapter_config.json" in f.files and f.has("non_lora_trainables"),
    (("adapter_model",), ("non_lora_trainables",)), PARTS, LORA_FOLDER, base=True,
  ),
  "peft": Format(
    "PEFT adapter alone, needs its base", lambda f: "adapter_config.json" in f.files,
    (("adapter_model",),), ("language_model",), LORA_FOLDER, base=True,
  ),
  "stage1": Format(
    "stage-1 projector of LLaVA or LLaVA-SP (model.bin or mm_projector.bin), needs its base",
    lambda f: _is_llava(f) and bool({"model.bin", "mm_projector.bin"} & f.files),
    (("model", "mm_projector"),), PARTS, ORIGINAL, base=True,
  ),
  "llava_hf": Format(
    "LLaVA in the layout of transformers (llava-hf)",
    lambda f: "text_config" in f.config and "vision_config" in f.config
    and str(f.config.get("model_type")).startswith("llava"),
    (torch_io.WEIGHTS,), PARTS, TRANSFORMERS,
  ),
  "llava": Format("LLaVA or LLaVA-SP, merged, in the original layout", _is_llava,
                  (torch_io.WEIGHTS,), PARTS, ORIGINAL),
  "vision_tower": Format(
    "CLIP or SigLIP (the full model or its vision part)",
    lambda f: f.config.get("model_type") in settings.TOWERS, (torch_io.WEIGHTS,),
    ("vision_tower",),
  ),
  "language_model": Format(
    "LLaMA-family language model of Hugging Face",
    lambda f: f.config.get("model_type") in settings.FAMILIES, (torch_io.WEIGHTS,),
    ("language_model",),
  ),
}  # fmt: skip


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


def look(path: Path) -> Folder:
  """Raises: FormatError when there is nothing at `path`."""
  if path.is_file():
    return Folder(path, frozenset({path.name}), {})
  if not path.is_dir():
    raise FormatError(f"{path}: no such folder or file")
  files = frozenset(p.name for p in path.iterdir())
  config = settings.read_json(path / "config.json") if "config.json" in files else {}
  return Folder(path, files, config)


def identify(folder: Folder) -> str:
  """The name of a folder's format. Raises: FormatError that lists the known ones."""
  for name, row in FORMATS.items():
    if row.matches(folder):
      return name
  known = "\n  ".join(f"{name}: {row.what}" for name, row in FORMATS.items())
  kind = folder.config.get("model_type", "no config.json with a model_type")
  raise FormatError(f"{folder.path}: unknown format ({kind}); known:\n  {known}")


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
    model = _with_projector(model, tensors, options.row or said.get("row", ""), str(folder.path))
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
  places = (folder.path, *([base] if base else []))
  tokenizer = next((p for p in places if _has_tokenizer(p)), None)
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
  base = resolve(options.base or _base_name(folder), folder.path, "--base")
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
  path = resolve(
    options.tower or folder.config.get("mm_vision_tower", ""), folder.path, "--tower"
  )  # fmt: skip
  values = settings.read_json(path / "config.json")
  tower = settings.tower(values, f"{path}/config.json", layer)
  inside = any(name.startswith("vision_model.") for name in tensors)
  return path, tower, {} if inside else torch_io.open_named(path, torch_io.WEIGHTS)


def resolve(name: str, beside: Path, flag: str) -> Path:
  """A local folder: `name` itself, one next to `beside`, or a copy fetched from the hub.

  Raises: FormatError that says which flag names it.
  """
  if not name:
    raise FormatError(f"{beside} does not say what it was trained on; name it with {flag}")
  for path in (Path(name), beside.parent / name, beside.parent.parent / name):
    if path.exists():
      return path
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    raise FormatError(f"{name}: no such folder, but {beside} needs it; name another with {flag}")
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

  wanted = ["*.json", "*.safetensors", "*.bin", "*.model"]
  try:
    return Path(snapshot_download(name, allow_patterns=wanted))
  except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
    raise FormatError(
      f"{name}: no such folder, and not fetched from the hub ({error}); name a folder with {flag}"
    ) from None


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


# Where the width of the spatial tokens shows: the first of these leaves that a row has.
_WIDTHS = (r"projector/(crop|pool)_0/kernel", r"projector/detail_\d+/conv/kernel",
           r"projector/register_0/token")  # fmt: skip


def _with_projector(
  model: config_lib.Model, tensors: Tensors, wanted: str, origin: str
) -> config_lib.Model:
  """`model` with the projector row whose names and shapes are those of the tensors.

  The original's configs do not say which variant they are. Raises: FormatError when no row fits
  (with what the nearest lacks), or when two do and `wanted` does not decide.
  """
  if wanted:
    config_lib.lookup("--row", wanted, ROWS)
  mine = [t for t in tensors.values() if not _ELSEWHERE.match(t.name)]
  fitting, nearest = [], (10**9, 10**9, "", [""])
  for candidate in _candidates(model, wanted):
    row, sizes = candidate.projector.row, build.view_sizes(candidate)
    names = tables.projector(row, model.tower.width, sizes)
    unexpected: list[str] = []
    found = leaves.gather(mine, names, unexpected)
    complete = {p: target.name for p, target in tables.by_path(names).items()
                if model.image_newline or p != _NEWLINE}  # fmt: skip
    problems = [f"missing {name}" for p, name in complete.items() if p not in found]
    if not unexpected and not problems:
      width = next((found[p].shape[-1] for w in _WIDTHS for p in found if re.fullmatch(w, p)), 512)
      projector = dataclasses.replace(candidate.projector, token_width=width)
      candidate = dataclasses.replace(candidate, projector=projector)
      expected = {p: s for p, s in flatten_dict(build.abstract(candidate), sep="/").items()
                  if p.startswith("projector/")}  # fmt: skip
      leaves.fit(found, expected, problems)
      if not problems:
        fitting.append(candidate)
    found_here = (len(unexpected), len(problems), row, unexpected + problems)
    nearest = min(nearest, found_here, key=lambda n: n[:2])
  if len(fitting) == 1:
    return fitting[0]
  if fitting:
    rows = " and ".join(c.projector.row for c in fitting)
    raise FormatError(
      f"{origin}: its tensors fit the projector rows {rows}, which differ only in how they "
      "compute; the original's config does not say which it is. Give --row."
    )
  *_, row, problems = nearest
  listed = "\n  ".join(problems)
  raise FormatError(
    f"{origin}: its projector is incomplete or of no known row, nothing was converted. The nearest "
    f"row is {row!r}:\n  {listed}"
  )


_NEWLINE = "projector/image_newline"


def _candidates(model: config_lib.Model, wanted: str) -> Iterator[config_lib.Model]:
  """Every row with its own scales for the tower's grid, and with those of the original's 24 grid."""
  for row in ROWS:
    if wanted not in ("", row):
      continue
    seen = set()
    for scales in ((), ROWS[row].scales(24)):
      projector = config_lib.Projector(row=row, scales=scales)
      candidate = dataclasses.replace(model, projector=projector)
      try:
        sizes = build.view_sizes(candidate)
      except config_lib.ConfigError:
        continue  # views larger than this tower's grid
      if sizes not in seen:
        seen.add(sizes)
        yield candidate


# Everything that is no projector's; what no row knows among the rest decides against a row.
_ELSEWHERE = re.compile(
  r"base_model\.|lm_head\.|model\.(layers|embed_tokens|norm)\.|vision_model\.|text_model\."
)


def _dtype(found: Leaves) -> str:
  """What to compute in and keep frozen parameters in: float32 where the base is stored in it."""
  base = [leaf for p, leaf in found.items() if not p.startswith("projector/") and not is_adapter(p)]
  largest = max(base, key=lambda leaf: leaf.nbytes)
  return "float32" if largest.dtype.itemsize >= 4 else "bfloat16"


def copy_tokenizer(folder: Path, out: Path) -> None:
  """The files of a tokenizer, and no others."""
  wanted = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
  out.mkdir(exist_ok=True)
  for path in sorted(folder.iterdir()):
    if path.is_file() and path.name.startswith(wanted):
      shutil.copy(path, out / path.name)


def _has_tokenizer(path: Path) -> bool:
  return any((path / n).is_file() for n in ("tokenizer.json", "tokenizer.model"))
