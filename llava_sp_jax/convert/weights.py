"""Opens the tensors of a folder under the names of `tables`."""

from __future__ import annotations

import re

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import projector_names, tables, torch_io
from llava_sp_jax.convert.catalog import Folder, Format, rename
from llava_sp_jax.convert.leaves import InTensors, Leaves
from llava_sp_jax.convert.torch_io import FormatError, Tensors
from llava_sp_jax.models import build

# Names of tensors that quantizers put beside or in place of a weight.
_QUANTIZED = re.compile(
  r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|weight_format"
  r"|qweight|qzeros|scales|g_idx|weight_scale(_inv)?|weight_packed|input_scale)"
)

# Prefixes of modules that torch wraps: compilation, FSDP, activation checkpoints, data parallelism.
_INNER = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"
_WRAPPERS = re.compile(rf"^(?:(?:module|{_INNER})\.)+|(?<=\.)(?:{_INNER})\.")


def named(folder: Folder, row: Format) -> Tensors:
  """Returns a folder's own tensors, without those of its base, by their names in `tables`.

  `row` is the folder's format. Raises: FormatError when two tensors have the same name, or their
  values cannot be used.
  """
  result: Tensors = {}
  for stems in row.weights:
    opened = torch_io.open_named(folder.path, stems)
    packed = [name for name in opened if _QUANTIZED.fullmatch(name)]
    if packed:
      raise FormatError(
        f"{folder.path}: quantized weights ({packed[0]} and {len(packed) - 1} more such tensors) "
        "are not read; give the folder that they were made from, or save it dequantized "
        "(transformers: model.dequantize(), then save_pretrained)"
      )
    empty = [t.name for t in opened.values() if 0 in t.shape]
    if empty:
      raise FormatError(
        f"{folder.path}: {len(empty)} tensors have no values (shape [0]: {empty[0]}): they were "
        "saved while DeepSpeed ZeRO-3 had them divided over processes; gather them with its "
        "zero_to_fp32.py, or save with stage3_gather_16bit_weights_on_model_save"
      )
    for name, tensor in opened.items():
      new = rename(_WRAPPERS.sub("", name), row.renames)
      if new in result:
        raise FormatError(f"{folder.path}: two tensors are {new}: {result[new].name}, {name}")
      result[new] = tensor.renamed(new)
  return result


def names_of(model: config_lib.ModelConfig, parts: tuple[str, ...]) -> tuple[tables.NameRule, ...]:
  """Returns the rows of `tables` for some parts of a model."""
  every = {
    "vision_tower": tables.TOWERS[model.tower.variant],
    "projector": projector_names.projector(
      model.projector.variant, model.tower.width, build.view_sizes(model)
    ),
    "language_model": tables.LLAMA + tables.LORA,
  }
  return tuple(row for part in parts for row in every[part])


def used_layers(found: Leaves, model: config_lib.ModelConfig) -> Leaves:
  """Drops the tower's blocks after the selected layer, which are never computed."""
  count = build.tower_layers(model)
  result = {}
  for path, leaf in found.items():
    if path.startswith("vision_tower/layers/") and isinstance(leaf, InTensors):
      leaf = leaf.first_layers(count)
    result[path] = leaf
  return result
