"""Writes a folder that transformers opens with the code in it, for every variant of the projector.

`AutoModelForImageTextToText` and `AutoProcessor` open it with `trust_remote_code=True`, and so does a
server that runs models of transformers, as vLLM.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import (
  hf_prompts,
  huggingface,
  key_tables,
  settings,
  settings_out,
  tables,
  torch_write,
)
from llava_sp_jax.convert.hf_prompts import Tokens
from llava_sp_jax.convert.leaves import to_tensors
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.convert.processors import RESAMPLE
from llava_sp_jax.convert.torch_io import FormatError, Tensor
from llava_sp_jax.data import conversation
from llava_sp_jax.data.conversation import IMAGE
from llava_sp_jax.models import build
from llava_sp_jax.models.projector import VARIANTS

CODE = Path(__file__).parent / "remote_code"
CONFIGURATION, MODELING, PROJECTOR, PROCESSING = FILES = tuple(
  f"{name}_llava_sp" for name in ("configuration", "modeling", "projector", "processing")
)
# What the code of the folder has: a variant of other parts needs code of its own there.
VIEWS = frozenset({"crop", "pool", "register"})
EXTRACTORS = frozenset({"conv", "register", "transformer", "transformer_channels_first"})
MERGES = frozenset({"concat", "sum"})


def refuse(model: Loaded) -> None:
  """Checks that the code of the folder has all parts of a model's projector.

  Raises: FormatError that names the parts that it lacks.
  """
  name = model.config.model.projector.variant
  variant = VARIANTS[name]
  lacking = {*variant.views} - VIEWS
  lacking |= {variant.extractor} - EXTRACTORS | {variant.detail_merge} - MERGES
  if lacking:
    raise FormatError(
      f"--format huggingface: variant {name} has {', '.join(sorted(lacking))}, which the code that "
      f"goes into the folder lacks; add it to {CODE / PROJECTOR}.py and to the lists in {__name__}"
    )


def write(model: Loaded, out: Path, tower: list[Tensor]) -> None:
  """Writes code, tensors, settings and tokenizer of a model without adapters to the folder `out`.

  `tower` are the tensors of the vision tower, under the names of `tables`.
  """
  config = model.config
  rows = config.model.language_model.vocab_size
  tokens = Tokens.of(model.tokenizer, config.data.template, rows, out)
  decoder = hf_prompts.with_rows(to_tensors(model.part("language_model"), tables.LLAMA), tokens)
  tensors = [t.renamed(t.name.replace("model.", "model.language_model.", 1)) for t in decoder]
  tensors += [t.renamed(f"model.vision_tower.{t.name}") for t in tower]
  sizes = build.view_sizes(config.model)
  variant, width = config.model.projector.variant, config.model.tower.width
  rules = huggingface.projector_rules(variant, width, sizes)
  tensors += to_tensors(model.part("projector"), rules)
  torch_write.save_safetensors(tensors, out)
  for name, values in _settings(config, tokens, max(rows, tokens.image + 1)).items():
    (out / name).write_text(json.dumps(values, indent=2) + "\n")
  template = conversation.TEMPLATES[config.data.template]
  if text := hf_prompts.chat_template(template, tokens.start):
    (out / "chat_template.jinja").write_text(text)
  for file in FILES:
    shutil.copy(CODE / f"{file}.py", out)


def _settings(config: config_lib.Config, tokens: Tokens, rows: int) -> dict[str, Any]:
  """Returns the JSON files beside the tensors, by name; `rows` are those of the embedding."""
  model, data = config.model, config.data
  text = dataclasses.replace(model.language_model, vocab_size=rows)
  generation = hf_prompts.generation(tokens)
  ends = {
    "bos_token_id": tokens.bos,
    "eos_token_id": next(iter(tokens.stops), None),
    "pad_token_id": tokens.pad,
  }
  vision = settings_out.tower_json(model.tower, build.tower_layers(model))
  if model.tower.variant == "siglip":
    vision["vision_use_head"] = False
  # The order in which canvases are listed decides between equally good ones.
  canvases = [[h, w] for w, h in data.grid_pinpoints] if data.image_aspect == "anyres" else []
  images = {"image_aspect_ratio": data.image_aspect, "image_grid_pinpoints": canvases}
  tokens_of_image = {
    "num_spatial_tokens": huggingface.spatial_tokens(model),
    "patch_merge_type": data.patch_merge,
  }
  whole = {
    "model_type": settings.OWN,
    "architectures": ["LlavaSPForConditionalGeneration"],
    "auto_map": {
      "AutoConfig": f"{CONFIGURATION}.LlavaSPConfig",
      "AutoModel": f"{MODELING}.LlavaSPModel",
      "AutoModelForImageTextToText": f"{MODELING}.LlavaSPForConditionalGeneration",
    },
    "text_config": {**settings_out.language_model_json(text, model.frozen_dtype), **ends},
    "vision_config": vision,
    "projector": huggingface.row(model),
    **tokens_of_image,
    "image_newline": model.image_newline,
    **images,
    "image_token_id": tokens.image,
    "vision_feature_layer": -1,
    "conversation_template": data.template,
    "base_dtype": model.frozen_dtype,
    "tokenizer_model_max_length": data.row_length,
    "torch_dtype": model.frozen_dtype,
    "tie_word_embeddings": text.tie_embeddings,
  }
  side = model.tower.image_size
  processor = {
    "processor_class": "LlavaSPProcessor",
    "auto_map": {"AutoProcessor": key_tables.PROCESSOR_CLASS},
    "image_processor": {
      "image_processor_type": "LlavaSPImageProcessor",
      "auto_map": {"AutoImageProcessor": f"{PROCESSING}.LlavaSPImageProcessor"},
      "size": {"height": side, "width": side},
      **images,
      "image_fit": data.image_fit,
      "resample": RESAMPLE.index(data.image_resample),
      "image_mean": list(data.image_mean),
      "image_std": list(data.image_std),
    },
    "patch_size": model.tower.patch_size,
    **tokens_of_image,
    "image_token": IMAGE,
  }
  return {
    "config.json": whole,
    "processor_config.json": processor,
    "generation_config.json": generation,
  }
