"""What the JSON files of a torch checkpoint say, as groups of our config.

Values that a file leaves out are the defaults of transformers' own config classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax import json_files
from llava_sp_jax.convert.torch_io import FormatError

# `model_type` of a config.json -> the family whose decoder it is.
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

Json = dict[str, Any]


def read_json(path: Path) -> Json:
  """A JSON object. Raises: FormatError."""
  return json_files.read_object(path)


def _filled(family: str, values: Json) -> Any:
  """transformers' config of a family with the given values over its defaults."""
  from transformers import CONFIG_MAPPING  # slow to import

  own = {k: v for k, v in values.items() if k not in ("model_type", "transformers_version")}
  return CONFIG_MAPPING[family](**own)


def _require(origin: str, values: Any, wanted: Json) -> None:
  """Raises: FormatError for settings that the model does not compute, all at once."""
  odd = [f"{key}={getattr(values, key)!r} (known: {known!r})" for key, known in wanted.items()
         if getattr(values, key, known) != known]  # fmt: skip
  if odd:
    raise FormatError(f"{origin}: not supported: {', '.join(odd)}")


def language_model(values: Json, origin: str) -> config_lib.LanguageModel:
  """Sizes of a LLaMA-family decoder. Raises: FormatError for what the decoder does not do."""
  kind = values.get("model_type", "llama")
  if kind not in FAMILIES:
    known = ", ".join(sorted(FAMILIES))
    raise FormatError(f"{origin}: model_type {kind!r} is no LLaMA-family decoder; known: {known}")
  family = FAMILIES[kind]
  filled = _filled(family, values)
  _require(origin, filled, {"hidden_act": "silu", "mlp_bias": False})
  heads = filled.num_attention_heads
  window = _window(filled, origin)
  return config_lib.LanguageModel(
    vocab_size=filled.vocab_size, width=filled.hidden_size, layers=filled.num_hidden_layers,
    heads=heads, kv_heads=filled.num_key_value_heads or heads,
    head_dim=getattr(filled, "head_dim", None) or filled.hidden_size // heads,
    mlp_width=filled.intermediate_size, norm_eps=filled.rms_norm_eps,
    rope_theta=float(filled.rope_parameters["rope_theta"]),
    rope_scaling=_rope(filled, origin), sliding_window=window,
    window_from_layer=_window_start(filled) if window else 0, attention_bias=_bias(family, filled, origin),
    max_positions=filled.max_position_embeddings,
    tie_embeddings=filled.tie_word_embeddings, initializer_range=filled.initializer_range,
  )  # fmt: skip


def _bias(family: str, filled: Any, origin: str) -> bool:
  """Qwen2 always has biases on q, k, v; LLaMA's `attention_bias` also means one on o."""
  if family == "qwen2":
    return True
  _require(origin, filled, {"attention_bias": False})
  return False


def _window(filled: Any, origin: str) -> int:
  """Positions that a query sees; 0 is all. Qwen2 has windows in its later layers only, if at all."""
  kinds = list(getattr(filled, "layer_types", None) or ())
  if kinds and kinds != sorted(kinds):
    raise FormatError(f"{origin}: not supported: layers with mixed attention {sorted(set(kinds))}")
  if kinds and set(kinds) == {"full_attention"}:
    return 0
  return getattr(filled, "sliding_window", None) or 0


def _window_start(filled: Any) -> int:
  return list(getattr(filled, "layer_types", None) or ()).count("full_attention")


def _rope(filled: Any, origin: str) -> config_lib.RopeScaling:
  values = filled.rope_parameters
  kind, unknown = values.get("rope_type", "default"), ("mscale", "mscale_all_dim", "truncate")
  odd = [f"{k}={values[k]!r}" for k in unknown if values.get(k) not in (None, True)]
  if odd or kind not in _ROPE_KEYS:
    raise FormatError(
      f"{origin}: not supported: rope {kind!r} {' '.join(odd)}; known: {', '.join(_ROPE_KEYS)}"
    )
  known = {
    "factor": values.get("factor"),
    "original_length": values.get("original_max_position_embeddings")
    or filled.max_position_embeddings,
    "low_frequency": values.get("low_freq_factor"),
    "high_frequency": values.get("high_freq_factor"),
    "beta_fast": values.get("beta_fast"),
    "beta_slow": values.get("beta_slow"),
    "attention_factor": values.get("attention_factor"),
  }
  return config_lib.RopeScaling(
    kind=kind, **{k: v for k, v in known.items() if v is not None and kind != "default"}
  )


def tower(folder_config: Json, origin: str, select_layer: int) -> config_lib.Tower:
  """Sizes of a CLIP or SigLIP tower, from a full model's config or the vision part's.

  Raises: FormatError for another kind of tower.
  """
  values = folder_config.get("vision_config", folder_config)
  kind = values.get("model_type", folder_config.get("model_type", "clip_vision_model"))
  if kind not in TOWERS:
    raise FormatError(f"{origin}: unknown vision tower {kind!r}; known: {', '.join(TOWERS)}")
  variant = TOWERS[kind]
  filled = _filled(f"{variant}_vision_model", values)
  acts = {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}
  _require(origin, filled, {"hidden_act": acts[variant], "num_channels": 3})
  return config_lib.Tower(
    variant=variant, image_size=filled.image_size, patch_size=filled.patch_size,
    width=filled.hidden_size, layers=filled.num_hidden_layers, heads=filled.num_attention_heads,
    mlp_width=filled.intermediate_size, select_layer=select_layer,
  )  # fmt: skip


# Image processor of transformers -> how it makes a picture square (`data.image.FITS`).
FITS = {"CLIPImageProcessor": "crop", "SiglipImageProcessor": "stretch"}


# What the original could be told and never was in its recipes -> the values that are computed.
ONLY: dict[str, tuple[Any, ...]] = {
  "mm_use_im_start_end": (False,),
  "mm_use_im_patch_token": (False,),
  "mm_projector_type": ("mlp2x_gelu",),
  "mm_vision_select_feature": ("patch", "cls_patch"),  # the same without a class token (SigLIP)
}


def images(values: Json, tower_folder: Path, origin: Path) -> dict[str, Any]:
  """Preprocessing as keys of `config.Data`: the model's own choices, then the tower's processor.

  Raises: FormatError when a file is missing or a processor is unknown.
  """
  odd = [f"{k}={values[k]!r}" for k, known in ONLY.items() if values.get(k) not in (None, *known)]
  if odd:
    raise FormatError(f"{origin}/config.json: not supported: {', '.join(odd)}")
  path = tower_folder / "preprocessor_config.json"
  processor = read_json(path)
  processor = processor.get("image_processor", processor)
  kind = str(processor.get("image_processor_type", "CLIPImageProcessor"))
  kind = kind.removesuffix("Fast").removesuffix("Pil")
  if kind not in FITS:
    raise FormatError(f"{path}: unknown image processor {kind!r}; known: {', '.join(FITS)}")
  result: dict[str, Any] = {
    "image_aspect": values.get("image_aspect_ratio") or "square",
    "image_fit": FITS[kind],
    "image_mean": tuple(float(v) for v in processor["image_mean"]),
    "image_std": tuple(float(v) for v in processor["image_std"]),
  }
  if values.get("image_grid_pinpoints"):
    result["grid_pinpoints"] = pinpoints(values["image_grid_pinpoints"], origin)
    result["patch_merge"] = values.get("mm_patch_merge_type", "flat")
  return result


def pinpoints(value: Any, origin: Path) -> tuple[tuple[int, int], ...]:
  """Canvas sizes of anyres; the original also writes them as a text. Raises: FormatError."""
  try:
    pairs = (
      json_files.parse(value.replace("(", "[").replace(")", "]").encode(), str(origin))
      if isinstance(value, str)
      else value
    )
    return tuple((int(width), int(height)) for width, height in pairs)
  except (ValueError, TypeError):
    raise FormatError(
      f"{origin}: image_grid_pinpoints {value!r:.80} is no list of (width, height)"
    ) from None


# ---- the way back: our config as the JSON files of others -------------------------------------------


def family(model: config_lib.LanguageModel) -> str:
  """The value of FAMILIES whose decoder this is."""
  return "qwen2" if model.attention_bias else "mistral" if model.sliding_window else "llama"


_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                  "qwen2": "Qwen2ForCausalLM"}  # fmt: skip
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


def language_model_json(model: config_lib.LanguageModel, dtype: str) -> Json:
  """A `config.json` that transformers reads (keys that versions 4 and 5 both know)."""
  kind = family(model)
  values: Json = {
    "model_type": kind, "architectures": [_ARCHITECTURES[kind]], "vocab_size": model.vocab_size,
    "hidden_size": model.width, "num_hidden_layers": model.layers,
    "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads,
    "head_dim": model.head_dim, "intermediate_size": model.mlp_width, "hidden_act": "silu",
    "rms_norm_eps": model.norm_eps, "rope_theta": model.rope_theta,
    "rope_scaling": _rope_json(model.rope_scaling),
    "max_position_embeddings": model.max_positions,
    "tie_word_embeddings": model.tie_embeddings, "initializer_range": model.initializer_range,
    "torch_dtype": DTYPES[dtype], "use_cache": True,
  }  # fmt: skip
  windowed: Json = {"sliding_window": model.sliding_window or None}
  return values | {
    "llama": {"attention_bias": False},
    "mistral": windowed,
    "qwen2": windowed | {"use_sliding_window": bool(model.sliding_window),
                         "max_window_layers": model.window_from_layer},
  }[kind]  # fmt: skip


_ROPE_KEYS: dict[str, dict[str, str]] = {  # kind -> transformers' key: ours
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


def _rope_json(rope: config_lib.RopeScaling) -> Json | None:
  values = {theirs: getattr(rope, ours) for theirs, ours in _ROPE_KEYS[rope.kind].items()}
  values = {k: v for k, v in values.items() if not (k == "attention_factor" and not v)}
  return {"type": rope.kind, "rope_type": rope.kind, **values} if values else None


def tower_json(tower: config_lib.Tower, layers: int) -> Json:
  """Config of the vision part alone, with as many layers as are used."""
  acts = {"clip": ("clip_vision_model", "CLIPVisionModel", "quick_gelu", 1e-5),
          "siglip": ("siglip_vision_model", "SiglipVisionModel", "gelu_pytorch_tanh", 1e-6)}  # fmt: skip
  kind, architecture, act, eps = acts[tower.variant]
  return {
    "model_type": kind, "architectures": [architecture], "image_size": tower.image_size,
    "patch_size": tower.patch_size, "hidden_size": tower.width, "num_hidden_layers": layers,
    "num_attention_heads": tower.heads, "intermediate_size": tower.mlp_width, "hidden_act": act,
    "layer_norm_eps": eps, "num_channels": 3,
  }  # fmt: skip


def processor_json(data: config_lib.Data, size: int) -> Json:
  """A `preprocessor_config.json` that gives the same pixels."""
  kind = {fit: name for name, fit in FITS.items()}[data.image_fit]
  square = {"height": size, "width": size}
  crop = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
  return {
    "image_processor_type": kind, "do_resize": True, "resample": 3, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(data.image_mean),
    "image_std": list(data.image_std), "do_convert_rgb": True,
    **(crop if data.image_fit == "crop" else {"size": square}),
  }  # fmt: skip


def llava_json(config: config_lib.Config, tower: str) -> Json:
  """The original's `config.json`. Raises: FormatError for a decoder that the original lacks."""
  kinds = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"),
           "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}  # fmt: skip
  model, data = config.model, config.data
  if family(model.language_model) not in kinds:
    raise FormatError(
      f"the original code has no LLaVA on {family(model.language_model)}; export the format "
      "llava_hf or language_model"
    )
  kind, architecture = kinds[family(model.language_model)]
  anyres = {"image_grid_pinpoints": [list(p) for p in data.grid_pinpoints],
            "mm_patch_merge_type": data.patch_merge}  # fmt: skip
  return {
    **language_model_json(model.language_model, model.frozen_dtype),
    "model_type": kind, "architectures": [architecture], "mm_vision_tower": tower,
    "mm_hidden_size": model.tower.width, "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": model.tower.select_layer, "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True,
    "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False,
    "mm_projector_lr": config.optimizer.projector_learning_rate,
    "image_aspect_ratio": data.image_aspect, "mm_patch_merge_type": "flat",
    "tokenizer_model_max_length": data.row_length, "tokenizer_padding_side": "right",
    **(anyres if data.image_aspect == "anyres" else {}),
  }  # fmt: skip
