"""Reads the adapters of PEFT: their settings, and the place of each pair of matrices.

Adapters of the decoder's seven projections stay adapters. A layer or projection without one gets
zeros, which stay zeros in training and change nothing. Adapters of the tower, the projector, the
embedding and the output layer are folded into the weights, in float32, when these are read.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import adapter_keys, keys, settings
from llava_sp_jax.convert.keys import Json
from llava_sp_jax.convert.torch_io import FormatError, Tensor, Tensors

FILE = "adapter_config.json"
MODULES = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn",
           "o_proj": "self_attn", "gate_proj": "mlp", "up_proj": "mlp",
           "down_proj": "mlp"}  # fmt: skip
_PAIR = re.compile(
  r"base_model\.model\.(?P<module>.*)\.lora_(?:(?P<letter>[AB])\.weight|embedding_(?P<row>[AB]))"
)
_DECODER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<name>\w+)")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TIED = re.compile(r"(?:base_model\.model\.)?(?:model\.embed_tokens|lm_head)\.(?:weight|lora_.*)")


@dataclasses.dataclass(frozen=True)
class Recipe:
  """Holds the settings of an adapter_config.json at `path`; `said` has those with an effect."""

  path: Path
  said: Json

  @property
  def lora(self) -> config_lib.LoraConfig:
    """Returns the LoRA config, where the scale is alpha / rank.

    PEFT's rsLoRA divides by the square root of the rank, so alpha is multiplied by it.
    """
    rank, alpha = self.said["r"], float(self.said["lora_alpha"])
    if self.said.get("use_rslora"):
      alpha *= math.sqrt(rank)
    return config_lib.LoraConfig(
      rank=rank, alpha=alpha, dropout=float(self.said.get("lora_dropout", 0.0))
    )

  def wants(self, module: str) -> bool | None:
    """Returns whether PEFT gives the module of this name an adapter; None if lists do not say so.

    A regular expression is not run, because anybody may have written it. Then the existing tensors
    decide.
    """
    names, excluded = self.said.get("target_modules"), self.said.get("exclude_modules") or []
    if not isinstance(names, list) or not names or isinstance(excluded, str):
      return None
    if _named(module, excluded) or not _named(module, names):
      return False
    layers, at = self.said.get("layers_to_transform"), _LAYER.search(module)
    if layers is None or layers == [] or module in names or not at:
      return True
    return int(at[1]) in (layers if isinstance(layers, list) else [layers])


def _named(module: str, names: list[str]) -> bool:
  return any(module == name or module.endswith(f".{name}") for name in names)


def recipe(folder: Path, allow_unknown: bool = False) -> Recipe | None:
  """Returns the adapter settings of a folder; None if it has no adapter_config.json.

  Raises: FormatError for settings that are missing, unknown or not supported.
  """
  path = folder / FILE
  if not path.is_file():
    return None
  said = keys.read(settings.read_json(path), adapter_keys.ADAPTER, str(path), allow_unknown)
  lacking = [name for name in ("r", "lora_alpha") if name not in said]
  if lacking:
    raise FormatError(f"{path}: {' and '.join(lacking)} missing: expected the settings of a LoRA")
  return Recipe(path, said)


def refuse_unfinished(folder: Path, files: frozenset[str], is_llava: bool) -> None:
  """Raises FormatError for a LLaVA's adapter that was saved without the projector.

  `files` are the names of the folder's files. `is_llava` says that its config.json is a LLaVA's;
  otherwise files of an unfinished training are looked for.
  """
  if is_llava:
    raise FormatError(
      f"{folder}: an adapter without its projector: config.json says that it is a LLaVA's, but "
      "non_lora_trainables.bin, where LLaVA's trainer puts the projector, is not there; get that "
      "file as well"
    )
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


@dataclasses.dataclass
class _Pair:
  """Holds the two matrices of a module; those of an embedding are transposed (`turned`)."""

  module: str  # its name in the file
  turned: bool
  parts: dict[str, Tensor]

  def fits(self, weight: Tensor, rank: int) -> bool:
    if set(self.parts) != {"A", "B"} or any(len(t.shape) != 2 for t in self.parts.values()):
      return False
    (a, inputs), (outputs, b) = self.parts["A"].shape, self.parts["B"].shape
    shape = (inputs, outputs) if self.turned else (outputs, inputs)
    return a == b == rank and weight.shape == shape

  def folded(self, weight: Tensor, scale: float) -> Tensor:
    """Returns the weight with the product added; computed in float32 when it is read."""

    def read() -> np.ndarray:
      a, b = (self.parts[letter].array().astype(np.float32) for letter in "AB")
      product = (b @ a).T if self.turned else b @ a
      return (weight.array().astype(np.float32) + scale * product).astype(weight.dtype)

    return dataclasses.replace(weight, array=read)


def _pairs(tensors: Tensors, folder: Path, canonical: Callable[[str], str]) -> dict[str, _Pair]:
  """Returns the adapters among the tensors, by the module's name in `tables`.

  Raises: FormatError when two tensors are the same matrix.
  """
  pairs: dict[str, _Pair] = {}
  for name, tensor in tensors.items():
    found = _PAIR.fullmatch(name)
    if not found:
      continue
    letter = found["letter"] or found["row"]
    stem = canonical(found["module"] + ".weight").removesuffix(".weight")
    pair = pairs.setdefault(stem, _Pair(found["module"], bool(found["row"]), {}))
    if letter in pair.parts:
      raise FormatError(f"{folder}: two tensors are lora_{letter} of {stem}")
    pair.parts[letter] = tensor
  return pairs


def place(
  tensors: Tensors, base: Tensors, of: Recipe, layers: int, canonical: Callable[[str], str]
) -> Tensors:
  """Returns a folder's own tensors with its adapters under the names of `tables.LORA`.

  Projections without an adapter get zeros. Adapters of other modules keep names of that form until
  `fold`.

  Args:
    tensors: the folder's tensors.
    base: those of its base.
    of: its adapter settings.
    layers: layers of the decoder.
    canonical: maps the name of a module's weight to its name in `tables`.

  Raises: FormatError when there are no adapters, or those that the settings name are missing.
  """
  pairs = _pairs(tensors, of.path.parent, canonical)
  if not pairs:
    raise FormatError(f"{of.path.parent}: no adapters in it, though {FILE} is there")
  odd = [
    pair.module
    for stem, pair in pairs.items()
    if f"{stem}.weight" in base and of.wants(pair.module) is False
  ]
  if odd:
    raise FormatError(
      f"{of.path.parent}: adapters of modules that {FILE} leaves out, so that PEFT would not use "
      f"them: {_listed(odd)}; take them out, or name them (target_modules, layers_to_transform)"
    )
  result = {name: tensor for name, tensor in tensors.items() if not _PAIR.fullmatch(name)}
  for stem, pair in pairs.items():
    form = "lora_embedding_{}" if pair.turned else "lora_{}.weight"
    for letter, tensor in pair.parts.items():
      name = f"base_model.model.{stem}.{form.format(letter)}"
      result[name] = tensor.renamed(name)
  return result | _absent(pairs, base, of, layers)


def untied(tensors: Tensors, base: Tensors, of: Recipe) -> Tensors:
  """Returns separate embedding and output layers if an adapter unties those of the base, else {}.

  `tensors` are what `place` returns. PEFT copies a layer that it trains in full, so the other one
  stays as it was. Low-rank matrices are added to the weight that both share.

  Raises: FormatError when both were trained as one.
  """
  touched = {name for name in tensors if _TIED.fullmatch(name)}
  if not touched or EMBEDDING not in base:
    return {}
  if of.said.get("ensure_weight_tying"):
    raise FormatError(
      f"{of.path}: not supported: ensure_weight_tying=True on a base whose output layer is its "
      "embedding, with an adapter of one of them"
    )
  result: Tensors = {}
  for here, there in ((EMBEDDING, HEAD), (HEAD, EMBEDDING)):
    adapted = any(here.removesuffix(".weight") + ".lora_" in name for name in touched)
    shared = tensors.get(here, base[EMBEDDING]) if adapted else base[EMBEDDING]
    if there not in tensors:
      result[there] = shared.renamed(there)
  return result


def fold(tensors: Tensors, of: Recipe) -> Tensors:
  """Adds all adapters, except those of the decoder's projections, to the weights that they adapt.

  Raises: FormatError that names the modules without a weight that fits their adapter.
  """
  pairs = _pairs(tensors, of.path.parent, lambda name: name)
  pairs = {stem: pair for stem, pair in pairs.items() if not _DECODER.fullmatch(stem)}
  result = {
    name: tensor
    for name, tensor in tensors.items()
    if not (found := _PAIR.fullmatch(name)) or found["module"] not in pairs
  }
  homeless = []
  for stem, pair in pairs.items():
    weight = result.get(f"{stem}.weight")
    if weight is None or not pair.fits(weight, of.lora.rank):
      homeless.append(stem)
    else:
      result[weight.name] = pair.folded(weight, of.lora.alpha / of.lora.rank)
  if homeless:
    raise FormatError(
      f"{of.path.parent}: adapters of rank {of.lora.rank} that fit no weight of this model: "
      f"{_listed(homeless)}"
    )
  return result


def _zeros(name: str, shape: tuple[int, int], dtype: np.dtype) -> Tensor:
  return Tensor(name, "no adapter", shape, dtype, lambda: np.zeros(shape, dtype))


def _absent(pairs: dict[str, _Pair], base: Tensors, of: Recipe, layers: int) -> Tensors:
  """Returns zeros for the projections without an adapter.

  Raises: FormatError for a missing adapter that the settings name.
  """
  like = next((t.dtype for p in pairs.values() for t in p.parts.values()), np.dtype(np.float32))
  known = next((p.module for stem, p in pairs.items() if _DECODER.fullmatch(stem)), "model.layers.")
  prefix = known[: known.rindex("layers.")]
  result: Tensors = {}
  missing = []
  for layer in range(layers):
    for name, block in MODULES.items():
      end = f"layers.{layer}.{block}.{name}"
      stem = f"model.{end}"
      weight = base.get(f"{stem}.weight")
      if stem in pairs or weight is None or len(weight.shape) != 2:
        continue
      if of.wants(prefix + end):
        missing.append(stem)
        continue
      outputs, inputs = weight.shape
      for letter, shape in (("A", (of.lora.rank, inputs)), ("B", (outputs, of.lora.rank))):
        full = f"base_model.model.{stem}.lora_{letter}.weight"
        result[full] = _zeros(full, shape, like)
  if missing:
    raise FormatError(
      f"{of.path.parent}: adapters are missing that {FILE} names (target_modules): "
      f"{_listed(missing)}"
    )
  return result


def _listed(names: list[str]) -> str:
  return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
