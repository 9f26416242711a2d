"""Lists the formats that can be read, which are told apart by a folder's files, not by its name."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path

from llava_sp_jax import files
from llava_sp_jax.convert import settings, torch_io
from llava_sp_jax.convert.keys import Json
from llava_sp_jax.convert.torch_io import FormatError

PARTS = ("vision_tower", "projector", "language_model")
NOTE = "llava_sp.json"  # what exports of this package add to the files of the original
Renames = tuple[tuple[str, str], ...]

# For each layout: (regex over its names, name in `tables`).
PLAIN: Renames = ()
TOWER: Renames = (  # transformers leaves out the tower's prefix since 5.0
  (r"((?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\..*)", r"vision_model.\1"),
)
ORIGINAL: Renames = (
  (r"model\.vision_tower\.vision_tower\.(.*)", r"\1"),
  (r"mm_projector\.(.*)", r"model.mm_projector.\1"),
  *TOWER,
)
TRANSFORMERS: Renames = (  # the published layout, and that of modules in transformers >= 4.52
  (r"(?:model\.)?vision_tower\.(.*)", r"\1"),
  (r"(?:model\.)?multi_modal_projector\.linear_1\.(.*)", r"model.mm_projector.0.\1"),
  (r"(?:model\.)?multi_modal_projector\.linear_2\.(.*)", r"model.mm_projector.2.\1"),
  (r"(?:model\.)?image_newline", r"model.image_newline"),
  (r"language_model\.(model\..*|lm_head\..*)", r"\1"),
  (r"model\.language_model\.(.*)", r"model.\1"),
  *TOWER,
)
HUGGINGFACE: Renames = (  # its projector is renamed by `huggingface.original_names`
  (r"model\.vision_tower\.(.*)", r"\1"),
  (r"model\.language_model\.(.*)", r"model.\1"),
  *TOWER,
)
LORA_FOLDER: Renames = (  # adapters keep their prefix, which `adapters.place` reads
  (r"(.*\.lora_[AB])\.default(\.weight)", r"\1\2"),
  (r"(.*\.lora_embedding_[AB])\.default", r"\1"),
  (r"(.*\.(?:embed_tokens|lm_head))\.base_layer(\.weight)", r"\1\2"),
  (r"base_model\.model\.(?!.*\.lora_)(.*)", r"\1"),
  (r"(.*)\.modules_to_save(?:\.default)?\.(weight|bias)", r"\1.\2"),
  *ORIGINAL,
  *TRANSFORMERS,
  (r"((?:layers|embed_tokens|norm)\..*)", r"model.\1"),  # of a decoder without its head (AutoModel)
)


@dataclasses.dataclass(frozen=True)
class Folder:
  """Holds what a checkpoint's folder, or a single file, is told apart by.

  These are the names of its files, and the content of its config.json, {} without one.
  """

  path: Path
  files: frozenset[str]
  config: Json

  def has(self, *stems: str) -> bool:
    """Returns whether a file, other than JSON, has one of these stems before its first dot."""
    return any(name.split(".")[0] in stems for name in self.files if not name.endswith(".json"))


@dataclasses.dataclass(frozen=True)
class Format:
  """Describes a format that can be read.

  `matches` tells whether a folder has it. `weights` are groups of file stems; one file of each
  group is opened. `parts` are the parts of the model that it gives, with its base.
  """

  what: str
  matches: Callable[[Folder], bool]
  weights: tuple[tuple[str, ...], ...]
  parts: tuple[str, ...]
  renames: Renames = PLAIN
  base: bool = False  # the language model's weights are in another folder


def _is_llava(folder: Folder) -> bool:
  return settings.is_llava(folder.config)


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
  "huggingface": Format(
    "LLaVA-SP for transformers, with the code in the folder",
    lambda f: settings.is_llava_hf(f.config) and f.config["model_type"] == settings.OWN,
    (torch_io.WEIGHTS,), PARTS, HUGGINGFACE,
  ),
  "llava_hf": Format(
    "LLaVA in the layout of transformers (llava-hf)",
    lambda f: "vision_config" in f.config and settings.is_llava_hf(f.config),
    (torch_io.WEIGHTS,), PARTS, TRANSFORMERS,
  ),
  "llava": Format("LLaVA or LLaVA-SP, merged, in the original layout", _is_llava,
                  (torch_io.WEIGHTS,), PARTS, ORIGINAL),
  "vision_tower": Format(
    "CLIP or SigLIP (the full model or its vision part)",
    lambda f: f.config.get("model_type") in (*settings.TOWERS, *settings.OTHER_TOWERS),
    (torch_io.WEIGHTS,),
    ("vision_tower",), TOWER,
  ),
  "language_model": Format(
    "LLaMA-family language model of Hugging Face",
    lambda f: f.config.get("model_type") in settings.FAMILIES, (torch_io.WEIGHTS,),
    ("language_model",),
  ),
}  # fmt: skip


def rename(name: str, renames: Renames) -> str:
  """Returns the name in `tables` of a tensor; `renames` are those of the format."""
  for pattern, target in renames:
    if re.fullmatch(pattern, name):
      name = re.sub(pattern, target, name)
  return name


_READ = (".json", *torch_io.OPENERS)  # endings of files that are opened


def look(path: Path) -> Folder:
  """Returns a folder's files and its config.json.

  Raises: FormatError when nothing is at `path`, or a file to read is a pipe or a dangling link.
  """
  if files.is_regular(path):
    return Folder(path, frozenset({path.name}), {})
  try:
    names = frozenset(os.listdir(path))
  except (FileNotFoundError, NotADirectoryError):
    raise FormatError(f"{path}: no such folder or file") from None
  except (OSError, ValueError) as error:
    raise FormatError(f"{str(path)[:200]!a}: cannot be read ({error!s:.100})") from None
  for name in sorted(names):
    if name.endswith(_READ) and not files.is_regular(path / name):
      files.open_regular(path / name).close()  # raises an error that says what it is
  config = settings.read_json(path / "config.json") if "config.json" in names else {}
  if not isinstance(config.get("model_type", ""), str):
    raise FormatError(f"{path}/config.json: model_type: expected a text")
  return Folder(path, names, config)


def identify(folder: Folder) -> str:
  """Returns the name of a folder's format, the first row of FORMATS that matches.

  Raises: FormatError, which lists the known ones, if none matches.
  """
  for name, row in FORMATS.items():
    if row.matches(folder):
      return name
  kind = folder.config.get("model_type")
  said = ascii(kind[:60])[1:-1] if kind else "no config.json with a model_type"
  raise FormatError(
    f"{folder.path}: unknown format ({said}); known: {', '.join(FORMATS)} (docs/converting.md)"
  )
