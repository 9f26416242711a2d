"""Names and settings of the files with which llama.cpp encodes pictures (`mmproj`, projector `mlp`).

llama.cpp has no spatial tokens, and prepares pictures in its own way.
Source: llama.cpp's `tools/mtmd` (clip.cpp, clip-impl.h, mtmd-image.cpp).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import settings_out
from llava_sp_jax.convert.gguf_names import Names
from llava_sp_jax.convert.keys import Json
from llava_sp_jax.convert.tensor import Tensor
from llava_sp_jax.models import build

ARCHITECTURE = "clip"
FILE = "mmproj.gguf"
# For llama.cpp since May 2025, which puts CLIP's class token behind the patches, but gives positions,
# and reads patches, as if it were in front (ggml-org/llama.cpp#25814). In this file, the positions
# are in that order. What remains is that the class token takes the place of the first patch.
CLASS_LAST = "mmproj-class-last.gguf"
_POSITIONS = "v.position_embd.weight"
PAD_COLOR = (122, 116, 104)  # with which llama.cpp makes pictures square: CLIP's mean

_BLOCK, _LAYER = "v.blk.{layer}", "vision_model.encoder.layers.{layer}"
_KINDS = ("weight", "bias")
NAMES: Names = (
  ("v.class_embd", "vision_model.embeddings.class_embedding"),
  (_POSITIONS, "vision_model.embeddings.position_embedding.weight"),
  *((f"v.patch_embd.{k}", f"vision_model.embeddings.patch_embedding.{k}") for k in _KINDS),
  *((f"v.pre_ln.{k}", f"vision_model.pre_layrnorm.{k}") for k in _KINDS),
  *(
    (f"{_BLOCK}.{ours}.{k}", f"{_LAYER}.{theirs}.{k}")
    for ours, theirs in (
      ("attn_q", "self_attn.q_proj"),
      ("attn_k", "self_attn.k_proj"),
      ("attn_v", "self_attn.v_proj"),
      ("attn_out", "self_attn.out_proj"),
      ("ln1", "layer_norm1"),
      ("ln2", "layer_norm2"),
      ("ffn_up", "mlp.fc1"),
      ("ffn_down", "mlp.fc2"),
    )
    for k in _KINDS
  ),
  *((f"mm.{n}.{k}", f"model.mm_projector.{n}.{k}") for n in "02" for k in _KINDS),
)
# llama.cpp adds these to float32 values, or takes rows or columns of them, which needs float32.
EXACT = ("v.class_embd", _POSITIONS, "v.patch_embd.weight")


def obstacle(config: config_lib.Config) -> str:
  """Returns why llama.cpp cannot encode pictures for a model; "" if it can."""
  model, data = config.model, config.data
  if build.image_token_count(model) > build.patch_grid(model) ** 2:
    return f"it has no spatial tokens (variant {model.projector.variant})"
  if data.image_aspect == "anyres" or model.image_newline:
    return "it puts tiles (anyres) in another order"
  if data.image_resample != "bicubic":
    return f"it resizes with bicubic filters, and not with {data.image_resample} ones"
  if model.tower.mlp_width == model.tower.width:
    return "it mixes up the two layers of an MLP that is as wide as its tower"
  return ""


def differences(config: config_lib.Config) -> list[str]:
  """Returns what llama.cpp does otherwise than training, so that its image tokens differ."""
  data = config.data
  color = tuple(int(m * 255) for m in data.image_mean)
  if data.image_aspect != "pad":
    found = ["pads pictures that are not square, but training did not (make them square first)"]
  elif color != PAD_COLOR:
    found = [
      f"pads pictures that are not square with the color {PAD_COLOR}, not {color} (make them "
      "square first)"
    ]
  else:
    found = ["pads pictures that are not square after it resizes them"]
  if CLASS_LAST in files(config):
    found.append(
      "has CLIP's class token behind the patches (ggml-org/llama.cpp#25814; until that is mended, "
      f"take {CLASS_LAST})"
    )
  return found


def files(config: config_lib.Config) -> tuple[str, ...]:
  """Returns the names of the files that encode pictures for a model, which `obstacle` admits."""
  return (FILE, CLASS_LAST) if config.model.tower.variant == "clip" else (FILE,)


def ordered(tensor: Tensor, file: str) -> Tensor:
  """Returns a tensor as `file` has it: with the position of the class token first, or last."""
  if file != CLASS_LAST or tensor.name != _POSITIONS:
    return tensor
  return dataclasses.replace(tensor, array=lambda: np.roll(tensor.array(), -1, axis=0))


def metadata(config: config_lib.Config) -> Json:
  """Returns the keys of the file; the tower is written with the layers that are used."""
  model, data = config.model, config.data
  layers = build.tower_layers(model)
  tower = settings_out.tower_json(model.tower, layers)
  vision = {
    "image_size": tower["image_size"],
    "patch_size": tower["patch_size"],
    "embedding_length": tower["hidden_size"],
    "feed_forward_length": tower["intermediate_size"],
    "projection_dim": model.language_model.width,
    "block_count": layers,
    "attention.head_count": tower["num_attention_heads"],
    "attention.layer_norm_epsilon": tower["layer_norm_eps"],
    "image_mean": list(data.image_mean),
    "image_std": list(data.image_std),
    "feature_layer": [layers],  # without it, the last block would not be computed
  }
  return {
    "has_vision_encoder": True,
    "projector_type": "mlp",
    "use_gelu": tower["hidden_act"] == "gelu_pytorch_tanh",  # or CLIP's quick_gelu
    **{f"vision.{key}": value for key, value in vision.items()},
  }
