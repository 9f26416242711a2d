"""Writes LLaVA for transformers: a folder for AutoProcessor and LlavaForConditionalGeneration.

Its tokenizer has `<image>`, and its embedding a row for it. Its processor makes the same pixels,
and its generation settings give the same tokens and the same end of an answer as the engine.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import hf_prompts, settings_out, tables, torch_write
from llava_sp_jax.convert.hf_prompts import Tokens
from llava_sp_jax.convert.leaves import to_tensors
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.convert.torch_io import FormatError, Tensor
from llava_sp_jax.data import conversation
from llava_sp_jax.data.conversation import IMAGE
from llava_sp_jax.models import build

_MLP = re.compile(r"model\.mm_projector\.([02])\.(weight|bias)")


def refuse(model: Loaded) -> None:
  """Checks that transformers' LlavaForConditionalGeneration can represent a model.

  Raises: FormatError for a model with spatial tokens, with several tiles for an image (anyres), or
    with a newline token.
  """
  config, data = model.config.model, model.config.data
  if build.image_token_count(config) > build.patch_grid(config) ** 2:
    raise FormatError(
      f"--format llava_hf: transformers has no spatial tokens (variant {config.projector.variant}); export 'huggingface' "
      "for transformers with code in the folder, or 'llava' for the original code"
    )
  if data.image_aspect == "anyres" or config.image_newline:
    raise FormatError("--format llava_hf: tiles (anyres) are not written; export 'huggingface'")


def write(
  model: Loaded, out: Path, tower: list[Tensor], projector: list[Tensor], start: bool = False
) -> None:
  """Writes tensors, settings and tokenizer of a model without adapters to the folder `out`.

  Args:
    model: the model.
    out: an empty folder.
    tower, projector: their tensors, under the names of `tables` and `projector_names`; of the
      projector, those of the patch MLP are written.
    start: whether the chat template has the begin-of-sequence token, for servers that add none.
  """
  config = model.config
  rows = config.model.language_model.vocab_size
  tokens = Tokens.of(model.tokenizer, config.data.template, rows, out)
  decoder = to_tensors(model.part("language_model"), tables.LLAMA)
  tensors = [t.renamed(f"language_model.{t.name}") for t in hf_prompts.with_rows(decoder, tokens)]
  tensors += [t.renamed(f"vision_tower.{t.name}") for t in tower]
  for tensor in projector:
    if found := _MLP.fullmatch(tensor.name):
      layer = {"0": "linear_1", "2": "linear_2"}[found[1]]
      tensors.append(tensor.renamed(f"multi_modal_projector.{layer}.{found[2]}"))
  torch_write.save_safetensors(tensors, out)
  for name, values in _settings(config, tokens, max(rows, tokens.image + 1)).items():
    (out / name).write_text(json.dumps(values, indent=2) + "\n")
  template = conversation.TEMPLATES[config.data.template]
  if text := hf_prompts.chat_template(template, tokens.start if start else ""):
    (out / "chat_template.jinja").write_text(text)


def _settings(config: config_lib.Config, tokens: Tokens, rows: int) -> dict[str, Any]:
  """Returns the JSON files beside the tensors, by name."""
  model, data = config.model, config.data
  clip = model.tower.variant == "clip"
  language_model = dataclasses.replace(model.language_model, vocab_size=rows)
  strategy = "default" if clip else "full"
  said = hf_prompts.generation(tokens)
  ids = {name: said[name] for name in ("bos_token_id", "pad_token_id")}
  text = settings_out.language_model_json(language_model, model.frozen_dtype)
  whole = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {**text, **ids, "eos_token_id": next(iter(tokens.stops), None)},
    "vision_config": settings_out.tower_json(model.tower, build.tower_layers(model)),
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": strategy,
    "image_seq_length": build.image_token_count(model),
    "image_token_index": tokens.image,
    "torch_dtype": model.frozen_dtype,
    "tie_word_embeddings": language_model.tie_embeddings,
  }
  processor = {
    "processor_class": "LlavaProcessor",
    "patch_size": model.tower.patch_size,
    "vision_feature_select_strategy": strategy,
    "image_token": IMAGE,
    "num_additional_image_tokens": int(clip),
  }
  pixels = settings_out.processor_json(data, model.tower.image_size)
  if data.image_aspect == "pad":
    crop = pixels.get("do_center_crop", False)  # no effect on a square
    pixels |= {
      "image_processor_type": "LlavaImageProcessor",
      "do_pad": True,
      "do_center_crop": crop,
    }
  pixels["processor_class"] = "LlavaProcessor"
  return {
    "config.json": whole,
    "processor_config.json": processor,
    "preprocessor_config.json": pixels,
    "generation_config.json": said,
  }
