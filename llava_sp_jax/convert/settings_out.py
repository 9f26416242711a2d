"""Writes the config as the foreign JSON files that exports have beside their tensors."""

from __future__ import annotations

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert.keys import Json
from llava_sp_jax.convert.processors import FITS, RESAMPLE
from llava_sp_jax.convert.settings import ROPE_KEYS
from llava_sp_jax.convert.torch_io import FormatError


def family(model: config_lib.LanguageModelConfig) -> str:
  """Returns the family of a decoder: "llama", "mistral" or "qwen2", told by biases and windows."""
  return "qwen2" if model.attention_bias else "mistral" if model.sliding_window else "llama"


_ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM",
                  "qwen2": "Qwen2ForCausalLM"}  # fmt: skip
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


def language_model_json(model: config_lib.LanguageModelConfig, dtype: str) -> Json:
  """Returns the keys of a decoder's `config.json`, which transformers 4 and 5 both read.

  `dtype` is that of the weights.
  """
  kind = family(model)
  values: Json = {
    "model_type": kind,
    "architectures": [_ARCHITECTURES[kind]],
    "vocab_size": model.vocab_size,
    "hidden_size": model.width,
    "num_hidden_layers": model.layers,
    "num_attention_heads": model.heads,
    "num_key_value_heads": model.kv_heads,
    "head_dim": model.head_dim,
    "intermediate_size": model.mlp_width,
    "hidden_act": "silu",
    "rms_norm_eps": model.norm_eps,
    "rope_theta": model.rope_theta,
    "rope_scaling": _rope_json(model.rope_scaling),
    "max_position_embeddings": model.max_positions,
    "tie_word_embeddings": model.tie_embeddings,
    "initializer_range": model.initializer_range,
    "torch_dtype": DTYPES[dtype],
    "use_cache": True,
  }
  windowed: Json = {"sliding_window": model.sliding_window or None}
  return (
    values
    | {
      "llama": {"attention_bias": False},
      "mistral": windowed,
      "qwen2": windowed
      | {
        "use_sliding_window": bool(model.sliding_window),
        "max_window_layers": model.window_from_layer,
      },
    }[kind]
  )


def _rope_json(rope: config_lib.RopeScaling) -> Json | None:
  values = {theirs: getattr(rope, ours) for theirs, ours in ROPE_KEYS[rope.kind].items()}
  values = {k: v for k, v in values.items() if not (k == "attention_factor" and not v)}
  return {"type": rope.kind, "rope_type": rope.kind, **values} if values else None


def tower_json(tower: config_lib.TowerConfig, layers: int) -> Json:
  """Returns the `config.json` of the vision part alone, with `layers` layers."""
  acts = {
    "clip": ("clip_vision_model", "CLIPVisionModel", "quick_gelu", 1e-5),
    "siglip": ("siglip_vision_model", "SiglipVisionModel", "gelu_pytorch_tanh", 1e-6),
  }
  kind, architecture, act, eps = acts[tower.variant]
  return {
    "model_type": kind,
    "architectures": [architecture],
    "image_size": tower.image_size,
    "patch_size": tower.patch_size,
    "hidden_size": tower.width,
    "num_hidden_layers": layers,
    "num_attention_heads": tower.heads,
    "intermediate_size": tower.mlp_width,
    "hidden_act": act,
    "layer_norm_eps": eps,
    "num_channels": 3,
  }


def processor_json(data: config_lib.DataConfig, size: int) -> Json:
  """Returns the `preprocessor_config.json` by which transformers makes the same pixels.

  `size` is the side of an image in pixels.
  """
  kind = {fit: name for name, fit in FITS.items()}[data.image_fit]
  square = {"height": size, "width": size}
  crop = {"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square}
  return {
    "image_processor_type": kind,
    "do_resize": True,
    "resample": RESAMPLE.index(data.image_resample),
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(data.image_mean),
    "image_std": list(data.image_std),
    "do_convert_rgb": True,
    **(crop if data.image_fit == "crop" else {"size": square}),
  }


def llava_json(config: config_lib.Config, tower: str) -> Json:
  """Returns the `config.json` that the original code reads; `tower` names the vision tower in it.

  Raises: FormatError for a decoder that the original does not have.
  """
  kinds = {
    "llama": ("llava_llama", "LlavaLlamaForCausalLM"),
    "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
  }
  model, data = config.model, config.data
  if family(model.language_model) not in kinds:
    raise FormatError(
      f"the original code has no LLaVA on {family(model.language_model)}; export the format "
      "huggingface or language_model"
    )
  kind, architecture = kinds[family(model.language_model)]
  anyres = {
    "image_grid_pinpoints": [list(p) for p in data.grid_pinpoints],
    "mm_patch_merge_type": data.patch_merge,
  }
  return {
    **language_model_json(model.language_model, model.frozen_dtype),
    "model_type": kind,
    "architectures": [architecture],
    "mm_vision_tower": tower,
    "mm_hidden_size": model.tower.width,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": model.tower.select_layer,
    "mm_vision_select_feature": "patch",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "use_mm_proj": True,
    "tune_mm_mlp_adapter": False,
    "freeze_mm_mlp_adapter": False,
    "mm_projector_lr": config.optimizer.projector_learning_rate,
    "image_aspect_ratio": data.image_aspect,
    "mm_patch_merge_type": "flat",
    "tokenizer_model_max_length": data.row_length,
    "tokenizer_padding_side": "right",
    **(anyres if data.image_aspect == "anyres" else {}),
  }
