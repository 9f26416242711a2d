"""PEFT's adapters: what their settings say, and where each pair of matrices goes.

The decoder's seven projections keep theirs; a layer or projection without any gets zeros, which
learn nothing and change nothing. Those of the tower and the projector are folded into the kernels,
in float32, when these are read.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import key_tables, keys, settings
from llava_sp_jax.convert.keys import Json
from llava_sp_jax.convert.torch_io import FormatError, Tensor, Tensors

FILE = "adapter_config.json"
MODULES = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn",
           "o_proj": "self_attn", "gate_proj": "mlp", "up_proj": "mlp", "down_proj": "mlp"}  # fmt: skip
_PAIR = re.compile(r"base_model\.model\.(?P<module>.*)\.lora_(?P<letter>[AB])\.weight")
_DECODER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<name>\w+)")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What adapter_config.json says."""

  path: Path
  said: Json

  @property
  def lora(self) -> config_lib.Lora:
    """Scale is alpha / rank here; PEFT's rsLoRA divides by the root of the rank."""
    rank, alpha = self.said["r"], float(self.said["lora_alpha"])
    if self.said.get("use_rslora"):
      alpha *= math.sqrt(rank)
    return config_lib.Lora(
      rank=rank, alpha=alpha, dropout=float(self.said.get("lora_dropout", 0.0))
    )

  def promises(self, module: str, layer: int) -> bool:
    """Whether the settings name a decoder's projection of a layer, as PEFT reads a list of names.

    A regular expression promises nothing: the tensors that are there decide.
    """
    names = self.said.get("target_modules")
    if not isinstance(names, list):
      return False
    excluded = self.said.get("exclude_modules") or []
    if isinstance(excluded, str) or _named(module, excluded) or not _named(module, names):
      return False
    layers = self.said.get("layers_to_transform")
    if layers is None or layers == [] or module in names:
      return True
    return layer in (layers if isinstance(layers, list) else [layers])


def _named(module: str, names: list[str]) -> bool:
  return any(module == name or module.endswith(f".{name}") for name in names)


def recipe(folder: Path, allow_unknown: bool = False) -> Recipe | None:
  """The recipe of a folder that has one. Raises: FormatError."""
  path = folder / FILE
  if not path.is_file():
    return None
  said = keys.read(settings.read_json(path), key_tables.ADAPTER, str(path), allow_unknown)
  lacking = [name for name in ("r", "lora_alpha") if name not in said]
  if lacking:
    raise FormatError(f"{path}: {' and '.join(lacking)} missing: expected the settings of a LoRA")
  return Recipe(path, said)


def refuse_unfinished(folder: Path, files: frozenset[str]) -> None:
  """Raises: FormatError for an adapter that LLaVA's trainer saved on its way, without projector."""
  states = sorted(n for n in files if n.startswith("global_step"))
  arguments = folder / "training_args.bin"
  of_llava = False
  if arguments.is_file():
    with arguments.open("rb") as file:
      said = file.read(1 << 20)
    of_llava = b"mm_projector" in said or b"tune_mm_mlp_adapter" in said or b"llava." in said
  if "trainer_state.json" in files and (states or of_llava):
    place = f"in {states[-1]}/ (DeepSpeed's state)" if states else "in no file of this folder"
    raise FormatError(
      f"{folder}: an adapter without its projector, saved on the way of a training: the projector "
      f"is {place}; take the finished folder, which has non_lora_trainables.bin, or gather it with "
      "zero_to_fp32.py (of a plain language model, copy adapter_config.json and adapter_model.* "
      "into a folder of their own)"
    )


def place(
  tensors: Tensors, base: Tensors, of: Recipe, layers: int, canonical: Callable[[str], str]
) -> Tensors:
  """Adapters under the names of `tables.LORA`, or folded into the tensors of `base`.

  `tensors` holds the folder's own, `canonical` gives the name in `tables` of a module's weight.

  Raises: FormatError when there are none, or when those that the settings name are missing.
  """
  pairs: dict[str, dict[str, Tensor]] = {}
  modules: dict[str, str] = {}
  result: Tensors = {}
  for name, tensor in tensors.items():
    found = _PAIR.fullmatch(name)
    if not found:
      result[name] = tensor
      continue
    stem = canonical(found["module"] + ".weight").removesuffix(".weight")
    if found["letter"] in pairs.setdefault(stem, {}):
      raise FormatError(f"{of.path.parent}: two tensors are lora_{found['letter']} of {stem}")
    pairs[stem][found["letter"]] = tensor
    modules[stem] = found["module"]
  if not pairs:
    raise FormatError(f"{of.path.parent}: no adapters in it, though {FILE} is there")
  scale = of.lora.alpha / of.lora.rank
  for stem, pair in pairs.items():
    inside = base.get(f"{stem}.weight")
    if _DECODER.fullmatch(stem) or inside is None or not _fits(inside, pair):
      result |= {f"base_model.model.{stem}.lora_{x}.weight":
                 t.renamed(f"base_model.model.{stem}.lora_{x}.weight") for x, t in pair.items()}  # fmt: skip
    else:
      result[inside.name] = _folded(inside, pair["A"], pair["B"], scale)
  return result | _absent(pairs, modules, base, of, layers)


def _fits(weight: Tensor, pair: dict[str, Tensor]) -> bool:
  if set(pair) != {"A", "B"} or not len(weight.shape) == len(pair["A"].shape) == 2:
    return False
  (rank, inputs), (outputs, other) = pair["A"].shape, pair["B"].shape
  return rank == other and weight.shape == (outputs, inputs)


def _folded(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
  def read() -> np.ndarray:
    product = b.array().astype(np.float32) @ a.array().astype(np.float32)
    return (weight.array().astype(np.float32) + scale * product).astype(weight.dtype)

  return dataclasses.replace(weight, array=read)


def _zeros(name: str, shape: tuple[int, int], dtype: np.dtype) -> Tensor:
  return Tensor(name, "no adapter", shape, dtype, lambda: np.zeros(shape, dtype))


def _absent(
  pairs: dict[str, Any], modules: dict[str, str], base: Tensors, of: Recipe, layers: int
) -> Tensors:
  """Zeros for the projections that have no adapter. Raises: FormatError where one is promised."""
  like = next((p["A"].dtype for p in pairs.values() if "A" in p), np.dtype(np.float32))
  known = next((s for s in modules if _DECODER.fullmatch(s)), None)
  prefix = modules[known][: modules[known].rindex("layers.")] if known else "model."
  result: Tensors = {}
  missing = []
  for layer in range(layers):
    for name, block in MODULES.items():
      end = f"layers.{layer}.{block}.{name}"
      stem = f"model.{end}"
      weight = base.get(f"{stem}.weight")
      if stem in pairs or weight is None or len(weight.shape) != 2:
        continue
      if of.promises(prefix + end, layer):
        missing.append(stem)
        continue
      outputs, inputs = weight.shape
      for letter, shape in (("A", (of.lora.rank, inputs)), ("B", (outputs, of.lora.rank))):
        full = f"base_model.model.{stem}.lora_{letter}.weight"
        result[full] = _zeros(full, shape, like)
  if missing:
    listed = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if missing[8:] else "")
    raise FormatError(
      f"{of.path.parent}: adapters are missing that {FILE} names (target_modules): {listed}"
    )
  return result
