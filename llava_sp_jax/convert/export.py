"""Writes checkpoints in the layouts that the original code, PEFT and transformers open.

Values are written tensor by tensor, so at most one shard of a file is held in memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax import folders
from llava_sp_jax.convert import (
  export_gguf,
  export_huggingface,
  export_stablehlo,
  huggingface,
  projector_names,
  settings_out,
  tables,
  torch_write,
)
from llava_sp_jax.convert import export_hf as save_hf
from llava_sp_jax.convert.folding import fold
from llava_sp_jax.convert.formats import NOTE, copy_tokenizer
from llava_sp_jax.convert.leaves import to_tensors
from llava_sp_jax.convert.loaded import Loaded, cast
from llava_sp_jax.convert.torch_io import FormatError, Tensor
from llava_sp_jax.models import build


def _language_model(model: Loaded, out: Path) -> None:
  """Writes the decoder as a plain Hugging Face folder."""
  text = model.config.model.language_model
  tensors = to_tensors(model.part("language_model"), tables.LLAMA)
  torch_write.save_safetensors(tensors, out)
  values = settings_out.language_model_json(text, _dtype(tensors))
  _json(out / "config.json", values)
  if model.tokenizer:
    copy_tokenizer(model.tokenizer, out)


def _vision_tower(model: Loaded, out: Path) -> None:
  """Writes the vision part alone, with the layers that are used.

  Its selected layer counts from its own end.
  """
  tower = model.config.model.tower
  torch_write.save_safetensors(_tower_tensors(model), out)
  _json(out / "config.json", settings_out.tower_json(tower, build.tower_layers(model.config.model)))
  _json(
    out / "preprocessor_config.json",
    settings_out.processor_json(model.config.data, tower.image_size),
  )


def _llava(model: Loaded, out: Path) -> None:
  """Writes the merged layout of the original.

  The tower stays in the folder that the config names; without a name, it is written beside the
  model.
  """
  config, tower = _with_tower(model, out)
  tensors = to_tensors(model.part("language_model"), tables.LLAMA)
  tensors += to_tensors(model.part("projector"), _projector_names(model))
  torch_write.save_safetensors(tensors, out)
  _json(out / "config.json", settings_out.llava_json(config, tower))
  _note(model, out)
  if model.tokenizer:
    copy_tokenizer(model.tokenizer, out)


def _llava_lora(model: Loaded, out: Path) -> None:
  """Writes adapter, other trained parameters and configs, as the original's `train.py` does."""
  lora = model.config.model.lora
  config, tower = _with_tower(model, out)
  base = model.base
  if not base:  # the base was trained, too, or its origin is unknown
    base = _final(out / "base")
    (out / "base").mkdir()
    _language_model(model, out / "base")
  adapters = model.part("language_model", adapters=True)
  torch_write.save_safetensors(to_tensors(adapters, tables.LORA), out, "adapter_model")
  projector = to_tensors(model.part("projector"), _projector_names(model))
  renamed = [t.renamed(f"base_model.model.{t.name}") for t in projector]
  torch_write.save_bin(renamed, out / "non_lora_trainables.bin")
  names = sorted({path.split("/")[-2] for path in adapters})
  _json(
    out / "adapter_config.json",
    {
      "peft_type": "LORA",
      "task_type": "CAUSAL_LM",
      "base_model_name_or_path": base,
      "r": lora.rank,
      "lora_alpha": _plain(lora.alpha),
      "lora_dropout": lora.dropout,
      "target_modules": names,
      "bias": "none",
      "fan_in_fan_out": False,
      "inference_mode": True,
      "init_lora_weights": True,
      "modules_to_save": None,
    },
  )
  _json(out / "config.json", {**settings_out.llava_json(config, tower), "_name_or_path": base})
  _note(model, out)
  if model.tokenizer:
    copy_tokenizer(model.tokenizer, out)


def _llava_hf(model: Loaded, out: Path) -> None:
  """Writes transformers' LlavaForConditionalGeneration; its tower has the layers that are used."""
  projector = to_tensors(model.part("projector"), _projector_names(model))
  save_hf.write(model, out, _tower_tensors(model), projector)
  _note(model, out)


def _huggingface(model: Loaded, out: Path) -> None:
  """Writes a folder for transformers with its code; its tower has the layers that are used."""
  export_huggingface.write(model, out, _tower_tensors(model))


def _vllm(model: Loaded, out: Path) -> None:
  """Writes transformers' LLaVA for a server that is given image tokens, not images.

  Its tower and patch MLP are this model's, but its projector has no spatial tokens.
  """
  projector = to_tensors(model.part("projector"), _projector_names(model))
  save_hf.write(model, out, _tower_tensors(model), projector, start=True)
  _note(model, out)  # whose variant keeps it from being read as a LLaVA without spatial tokens


def _gguf(model: Loaded, out: Path) -> None:
  """Writes llama.cpp's files: the decoder, and tower and patch MLP if it can encode pictures."""
  projector = to_tensors(model.part("projector"), _projector_names(model))
  export_gguf.write(model, out, _tower_tensors(model), projector)


def _tower_tensors(model: Loaded) -> list[Tensor]:
  """Returns the tower under its own names, with a last norm.

  Its class in transformers has that norm, but LLaVA does not read its result.
  """
  tower = model.config.model.tower
  tensors = to_tensors(model.part("vision_tower"), tables.TOWERS[tower.variant])
  dtype = tensors[0].dtype
  for kind, values in (
    ("weight", np.ones(tower.width, dtype)),
    ("bias", np.zeros(tower.width, dtype)),
  ):
    name = f"vision_model.post_layernorm.{kind}"
    tensors.append(Tensor(name, "unused", values.shape, dtype, values.copy))
  return tensors


def _with_tower(model: Loaded, out: Path) -> tuple[config_lib.Config, str]:
  """Returns the config, and the name of the tower.

  A tower without a name is written into the export.
  """
  if model.tower:
    return model.config, model.tower
  tower = model.config.model.tower
  folder = out / f"{tower.variant}-vit"  # the original recognizes CLIP by "clip" in the path
  folder.mkdir()
  _vision_tower(model, folder)
  selected = dataclasses.replace(tower, select_layer=-1)
  config = dataclasses.replace(
    model.config, model=dataclasses.replace(model.config.model, tower=selected)
  )
  return config, _final(folder)


def _final(path: Path) -> str:
  """Returns the final path of a part of an unfinished export."""
  return str(
    path.parent.with_name(path.parent.name.removesuffix(folders.PART)).resolve() / path.name
  )


def _projector_names(model: Loaded) -> tuple[tables.NameRule, ...]:
  sizes = build.view_sizes(model.config.model)
  variant, width = model.config.model.projector.variant, model.config.model.tower.width
  return projector_names.projector(variant, width, sizes)


def _note(model: Loaded, out: Path) -> None:
  """Writes what the files of the original lack.

  These are the projector's variant, the template, and the base that was trained on.
  """
  projector = model.config.model.projector
  _json(
    out / NOTE,
    {
      "variant": projector.variant,
      "scales": list(projector.scales),
      "template": model.config.data.template,
      "base_fingerprint": model.fingerprint,
      "base_dtype": model.config.model.frozen_dtype,
    },
  )


def _dtype(tensors: list[Tensor]) -> str:
  return str(max(tensors, key=lambda t: t.nbytes).dtype)


def _plain(value: float) -> int | float:
  return int(value) if value == int(value) else value


def _json(path: Path, values: dict[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class Export:
  """Describes a format that can be written.

  `folds` merges adapters into the weights first. `refuse` raises FormatError for a model that the
  format cannot hold. `note` says what a user of the result must know.
  """

  what: str
  write: Callable[[Loaded, Path], None]
  parts: tuple[str, ...]
  folds: bool = True
  refuse: Callable[[Loaded], None] = lambda model: None
  note: Callable[[Loaded], str] = lambda model: ""


EXPORTS: dict[str, Export] = {
  "llava_lora": Export(
    "adapter + non_lora_trainables.bin of the original code (the adapter opens in PEFT)",
    _llava_lora, ("vision_tower", "projector", "language_model"), folds=False,
  ),
  "llava": Export("merged folder of the original code", _llava,
                  ("vision_tower", "projector", "language_model")),
  "llava_hf": Export("transformers' LlavaForConditionalGeneration (variant none)", _llava_hf,
                     ("vision_tower", "projector", "language_model"), refuse=save_hf.refuse),
  huggingface.NAME: Export("transformers, of every variant, with its code in the folder", _huggingface,
                           ("vision_tower", "projector", "language_model"),
                           refuse=export_huggingface.refuse),
  "vllm": Export("a stock vLLM that reads image tokens of `llava-sp encode`", _vllm,
                 ("vision_tower", "projector", "language_model")),
  "stablehlo": Export("programs of encode, prefill and decode, for jax without this package",
                      export_stablehlo.write, ("vision_tower", "projector", "language_model"),
                      refuse=export_stablehlo.refuse),
  "gguf": Export("llama.cpp: the decoder, and what encodes pictures (variant none)", _gguf,
                 ("vision_tower", "projector", "language_model"), refuse=export_gguf.refuse,
                 note=export_gguf.note),
  "language_model": Export("the decoder alone, for transformers", _language_model,
                           ("language_model",)),
  "vision_tower": Export("the vision tower alone, for transformers", _vision_tower,
                         ("vision_tower",)),
}  # fmt: skip


def export(model: Loaded, name: str, out: str | Path, dtype: str = "") -> None:
  """Writes `model` in the format `name`; the folder `out` appears when it is complete.

  `dtype` casts every array (float32, bfloat16, float16); "" keeps the stored dtypes.

  Raises: FormatError when the format cannot hold the model; FolderError when `out` is not empty.
  """
  row, out = config_lib.lookup("--format", name, EXPORTS), folders.local(out)
  _refuse(model, name, row)
  if dtype:
    model = cast(model, dtype)
  if row.folds and model.config.model.lora.rank:
    # The export has no base whose fingerprint could be compared.
    model = dataclasses.replace(fold(model), fingerprint="")
  with folders.renamed(out, "export") as temporary:
    row.write(model, temporary)
    _set_default_mode(temporary)


def _set_default_mode(folder: Path) -> None:
  """Gives all files the default mode, because some writers make theirs private."""
  mode = folder.stat().st_mode & 0o666
  for path in folder.rglob("*"):
    if path.is_file():
      path.chmod(mode)


def _refuse(model: Loaded, name: str, row: Export) -> None:
  have = {path.split("/")[0] for path in model.leaves}
  lacking = [part for part in row.parts if part not in have]
  if lacking:
    raise FormatError(f"--format {name} needs {', '.join(lacking)}, which this checkpoint lacks")
  if not row.folds and not model.config.model.lora.rank:
    raise FormatError(f"--format {name}: this checkpoint has no adapters; export 'llava' instead")
  row.refuse(model)
