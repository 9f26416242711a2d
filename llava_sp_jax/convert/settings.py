"""Reads the JSON files of a torch checkpoint as groups of the config.

Every key must be in a table of `key_tables`. Missing values are the defaults of transformers'
config classes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax import json_files
from llava_sp_jax.convert import huggingface_keys, key_tables, keys
from llava_sp_jax.convert.keys import Json
from llava_sp_jax.convert.torch_io import FormatError

# `model_type` of a config.json -> family of its decoder.
FAMILIES = {
  "llama": "llama",
  "llava": "llama",
  "llava_llama": "llama",
  "mistral": "mistral",
  "llava_mistral": "mistral",
  "qwen2": "qwen2",
  "llava_qwen": "qwen2",
  "llava_qwen2": "qwen2",
}

TOWERS = {"clip": "clip", "clip_vision_model": "clip", "siglip": "siglip",
          "siglip_vision_model": "siglip"}  # fmt: skip
_NAFLEX = (
  "SigLIP 2 of variable resolution (NaFlex) is not computed here; take one of fixed size, as "
  "google/siglip2-so400m-patch14-384"
)
OTHER_TOWERS = {"siglip2": _NAFLEX, "siglip2_vision_model": _NAFLEX}  # refused, with the reason
OWN = "llava_sp"  # `model_type` of what `--format huggingface` writes


def read_json(path: Path) -> Json:
  """Reads a JSON object. Raises: FormatError when the file cannot be read, or is anything else."""
  return json_files.read_object(path)


def _filled(family: str, values: Json, origin: str) -> Any:
  """Returns transformers' config of a family, with the given values over its defaults."""
  from transformers import CONFIG_MAPPING  # slow to import

  own = {k: v for k, v in values.items() if k not in ("model_type", "_name_or_path")}
  try:
    return CONFIG_MAPPING[family](**own)
  except Exception as error:  # its checks may raise any error
    said = " ".join(str(error).split())
    raise FormatError(f"{origin}: transformers refuses these settings: {said:.200}") from None


def is_llava(values: Json) -> bool:
  """Returns whether `values` are the config.json of the original LLaVA: it has mm_vision_tower."""
  return "mm_vision_tower" in values


def is_llava_hf(values: Json) -> bool:
  """Returns whether `values` are the config.json of transformers' Llava or LlavaNext, or of OWN."""
  return "text_config" in values and values.get("model_type") in ("llava", "llava_next", OWN)


def decoder(values: Json) -> Json:
  """Returns the decoder's keys of a config.json.

  In transformers' LLaVA they are the group text_config, but the outer file can tie embedding and
  output layer, too.
  """
  inner = values.get("text_config", values)
  tied = inner is not values and values.get("tie_word_embeddings") is True
  return {**inner, "tie_word_embeddings": True} if tied and isinstance(inner, dict) else inner


def language_model(
  values: Json, origin: str, allow_unknown: bool = False
) -> config_lib.LanguageModelConfig:
  """Returns the sizes and settings of a LLaMA-family decoder.

  Args:
    values: the decoder's keys of a config.json.
    origin: the file, for messages.
    allow_unknown: whether keys that no table has are ignored.

  Raises: FormatError for settings that the decoder does not support.
  """
  kind = values.get("model_type", "llama") if isinstance(values, dict) else "llama"
  if not isinstance(kind, str) or kind not in FAMILIES:
    known = ", ".join(sorted(FAMILIES))
    raise FormatError(
      f"{origin}: model_type {kind!r:.60} is no LLaMA-family decoder; known: {known}"
    )
  family = FAMILIES[kind]
  table = dict(key_tables.DECODERS[family])
  if is_llava(values) or kind.startswith("llava"):
    table |= key_tables.LLAVA
  said = keys.read(values, table, origin, allow_unknown)
  said = {k: v for k, v in said.items() if k not in key_tables.LLAVA}
  for name in ("rope_scaling", "rope_parameters"):
    if said.get(name):
      keys.read(said[name], key_tables.ROPE, f"{origin}: {name}", allow_unknown)
  filled = _filled(family, said, origin)
  heads = filled.num_attention_heads
  window = _window(filled, origin, said)
  return config_lib.LanguageModelConfig(
    vocab_size=filled.vocab_size,
    width=filled.hidden_size,
    layers=filled.num_hidden_layers,
    heads=heads,
    kv_heads=filled.num_key_value_heads or heads,
    head_dim=getattr(filled, "head_dim", None) or filled.hidden_size // heads,
    mlp_width=filled.intermediate_size,
    norm_eps=float(filled.rms_norm_eps),
    rope_theta=float(filled.rope_parameters["rope_theta"]),
    rope_scaling=_rope(filled, origin),
    sliding_window=window,
    window_from_layer=_window_start(filled) if window else 0,
    attention_bias=family == "qwen2",  # Qwen2 always has biases on q, k, v
    max_positions=filled.max_position_embeddings,
    tie_embeddings=filled.tie_word_embeddings,
    initializer_range=float(filled.initializer_range),
  )


def _window(filled: Any, origin: str, said: Json) -> int:
  """Returns how many positions a query attends to, its own included; 0 for no sliding window.

  Args:
    filled: transformers' config, with its defaults where the file says nothing.
    origin: the file, for messages.
    said: the keys that the file has.

  Windows in the later layers only, which Qwen2 can have, are counted alike (`_window_start` says
  where they begin).

  Raises: FormatError for windows in other layers, or for windows without a size.
  """
  kinds = list(getattr(filled, "layer_types", None) or ())
  if said.get("layer_types") and set(kinds) - {"full_attention"} and not filled.sliding_window:
    raise FormatError(f"{origin}: layer_types names windows, but no sliding_window is used")
  if kinds and kinds != sorted(kinds):
    raise FormatError(f"{origin}: not supported: layers with mixed attention {sorted(set(kinds))}")
  if kinds and set(kinds) == {"full_attention"}:
    return 0
  return getattr(filled, "sliding_window", None) or 0


def _window_start(filled: Any) -> int:
  return list(getattr(filled, "layer_types", None) or ()).count("full_attention")


def _rope(filled: Any, origin: str) -> config_lib.RopeScaling:
  values = filled.rope_parameters
  kind = values.get("rope_type", "default")
  if kind not in ROPE_KEYS:
    raise FormatError(f"{origin}: not supported: rope {kind!r:.60}; known: {', '.join(ROPE_KEYS)}")
  longest = filled.max_position_embeddings
  trained = values.get("original_max_position_embeddings") or longest
  if "original_max_position_embeddings" not in ROPE_KEYS[kind]:
    trained = longest
  if values.get("factor") is None and kind not in ("default", "yarn"):
    raise FormatError(f"{origin}: rope {kind!r} without a factor; expected a number from 1")
  known: dict[str, Any] = {
    "factor": values.get("factor") or longest / trained,  # the default of yarn
    "original_length": trained,
    "low_frequency": values.get("low_freq_factor"),
    "high_frequency": values.get("high_freq_factor"),
    "beta_fast": values.get("beta_fast"),
    "beta_slow": values.get("beta_slow"),
    "attention_factor": values.get("attention_factor"),
  }
  said = {k: v for k, v in known.items() if v is not None and kind != "default"}
  numbers: dict[str, Any] = {k: v if k == "original_length" else float(v) for k, v in said.items()}
  return config_lib.RopeScaling(kind=kind, **numbers)


ROPE_KEYS: dict[str, dict[str, str]] = {  # kind -> {transformers' key: field of RopeScaling}
  "default": {},
  "linear": {"factor": "factor"},
  "dynamic": {"factor": "factor"},
  "llama3": {"factor": "factor", "low_freq_factor": "low_frequency",
             "high_freq_factor": "high_frequency",
             "original_max_position_embeddings": "original_length"},
  "yarn": {"factor": "factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow",
           "attention_factor": "attention_factor",
           "original_max_position_embeddings": "original_length"},
}  # fmt: skip


def tower(
  folder_config: Json, origin: str, select_layer: int, allow_unknown: bool = False
) -> config_lib.TowerConfig:
  """Returns the sizes of a CLIP or SigLIP tower.

  Args:
    folder_config: the config.json of a full model, or of its vision part.
    origin: the file, for messages.
    select_layer: the hidden state that is read; negative ones count from the end.
    allow_unknown: whether keys that no table has are ignored.

  Raises: FormatError for another kind of tower, or a selected layer that it does not have.
  """
  values = _tower_group(folder_config, origin)
  outer = folder_config.get("model_type", "clip_vision_model")
  kind = values.get("model_type", outer) if isinstance(values, dict) else None
  if is_llava_hf(folder_config) and isinstance(values, dict):
    kind = values.get("model_type", "clip_vision_model")
  if isinstance(kind, str) and kind in OTHER_TOWERS:
    raise FormatError(f"{origin}: not supported: {kind}: {OTHER_TOWERS[kind]}")
  if not isinstance(kind, str) or kind not in TOWERS:
    raise FormatError(f"{origin}: unknown vision tower {kind!r:.60}; known: {', '.join(TOWERS)}")
  variant = TOWERS[kind]
  if values is not folder_config and not is_llava_hf(folder_config):
    keys.read(folder_config, key_tables.WHOLE_TOWER, origin, allow_unknown)
  said = keys.read(values, key_tables.TOWERS[variant], origin, allow_unknown)
  filled = _filled(f"{variant}_vision_model", said, origin)
  count = filled.num_hidden_layers
  if not -count <= select_layer <= count or not select_layer:
    raise FormatError(f"{origin}: layer {select_layer} is selected of a tower with {count} layers")
  return config_lib.TowerConfig(
    variant=variant,
    image_size=filled.image_size,
    patch_size=filled.patch_size,
    width=filled.hidden_size,
    layers=count,
    heads=filled.num_attention_heads,
    mlp_width=filled.intermediate_size,
    select_layer=select_layer,
  )


def _tower_group(whole: Json, origin: str) -> Any:
  """Returns the tower's keys: the group vision_config or vision_config_dict, or the whole file.

  Older files use vision_config_dict.

  Raises: FormatError when both groups are there and differ.
  """
  newer, older = (whole.get(name) for name in ("vision_config", "vision_config_dict"))
  if isinstance(newer, dict) and isinstance(older, dict):
    if odd := sorted(k for k in set(newer) & set(older) if newer[k] != older[k]):
      raise FormatError(
        f"{origin}: vision_config and vision_config_dict differ in {', '.join(odd)[:200]}; take "
        "the wrong one out"
      )
    return {**older, **newer}
  return next((group for group in (newer, older) if group is not None), whole)


def llava(values: Json, origin: str, allow_unknown: bool = False) -> Json:
  """Returns the LLaVA settings of a config.json that have an effect, without decoder and tower.

  Returns {} for a model that is no LLaVA. `origin` is the file, for messages.

  Raises: FormatError for unknown keys, unless `allow_unknown`, and for wrong values.
  """
  if is_llava_hf(values):
    if values["model_type"] == OWN:
      return keys.read(values, huggingface_keys.CONFIG, origin, allow_unknown)
    said = keys.read(values, key_tables.LLAVA_HF, origin, allow_unknown)
    return {"vision_feature_select_strategy": "default", **said}
  if not is_llava(values):
    return {}
  kind = values.get("model_type", "llama")
  family = FAMILIES.get(kind, "llama") if isinstance(kind, str) else "llama"
  table = {**key_tables.DECODERS[family], **key_tables.LLAVA}
  said = keys.read(values, table, origin, allow_unknown)
  return {k: v for k, v in said.items() if k in key_tables.LLAVA}


def select_layer(values: Json, origin: str) -> int:
  """Returns the index of the tower's hidden state that a LLaVA reads, by default -2.

  `origin` is the file, for messages. Raises: FormatError for several layers, or layer 0.
  """
  for name in ("mm_vision_select_layer", "vision_feature_layer"):
    if name in values:
      found = values[name]
      if isinstance(found, list) and len(found) == 1:
        found = found[0]
      if isinstance(found, list) or found == 0:
        raise FormatError(
          f"{origin}: not supported: {name}={found!r:.60}: features behind one layer are computed"
        )
      return int(found)
  return -2


# Names of decoders that were not trained on template v1 -> the template that the original uses.
_OTHER_TEMPLATES = (
  (r"yi-?\d|hermes|34b", "chatml_direct"),
  (r"mistral|mixtral|zephyr", "mistral_instruct"),
  (r"qwen", "chatml_direct"),
  (r"llama-?2.*chat|llama_2", "llava_llama_2"),
  (r"mpt", "mpt"),
  (r"llama-?3|phi|gemma|smollm|internlm|baichuan|stablelm|tinyllama|falcon|opt-|pythia", ""),
)


def other_template(names: Sequence[str]) -> tuple[str, str] | None:
  """Returns the first of the decoder's names that suggests another template than v1, or None.

  Beside the name is the template that the original uses for it, or "" if it has none.
  """
  for name in names:
    for pattern, choice in _OTHER_TEMPLATES:
      if re.search(pattern, name.lower()):
        return name, choice
  return None
