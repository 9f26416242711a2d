"""Tiny models of transformers, and our logits beside theirs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax.convert import leaves
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.models import build
from tests.convert.test_exports_in_torch import close, run
from tests.convert.test_round_trip import source

VISION = {
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 3,
  "image_size": 28,
  "num_attention_heads": 2,
  "patch_size": 14,
}
TEXT = {
  "hidden_size": 16,
  "intermediate_size": 24,
  "num_hidden_layers": 2,
  "vocab_size": 64,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}
IMAGE, SIZE, PATCHES = 63, 28, 4  # the image's token, pixels, tokens of a tile
PIXELS = {
  "image_mean": [0.4, 0.5, 0.6],
  "image_std": [0.2, 0.3, 0.25],
  "resample": 3,
  "size": {"shortest_edge": SIZE},
  "crop_size": {"height": SIZE, "width": SIZE},
  "image_processor_type": "CLIPImageProcessor",
}
TOKENS = np.random.default_rng(1).integers(0, TEXT["vocab_size"] - 1, (1, 10))


def randomized(model: Any, seed: int = 0) -> Any:
  """Weights far from their beginnings, norms and biases included."""
  import torch

  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
  return model.eval()


def loaded(folder: Path) -> Any:
  import torch
  from transformers import LlavaForConditionalGeneration

  return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def decoder(folder: Path) -> Any:
  import torch
  from transformers import AutoModelForCausalLM

  return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def completed(opened: Loaded) -> Loaded:
  """A decoder alone with parts of zeros beside it, for `run`."""
  from flax.traverse_util import flatten_dict

  model = dataclasses.replace(opened.config.model, tower=source("none").config.model.tower)
  tree = flatten_dict(build.abstract(model), sep="/")
  rest = {p: np.zeros(x.shape, np.float32) for p, x in tree.items() if p not in opened.leaves}
  config = dataclasses.replace(opened.config, model=model)
  return dataclasses.replace(
    opened, config=config, leaves={**leaves.in_memory(rest), **opened.leaves}
  )


def asked(count: int = PATCHES) -> tuple[np.ndarray, np.ndarray]:
  """Ids with the places of an image, and our slots for them."""
  ids = np.concatenate([[3], np.full(count, IMAGE), [5, 7, 9]])[None]
  return ids, np.where(ids == IMAGE, np.arange(ids.shape[1]) - 1, -1)


def same_logits(opened: Loaded, theirs: Any) -> None:
  """Of a prompt with one square picture."""
  import torch

  ids, slots = asked()
  pixels = np.random.default_rng(2).normal(size=(SIZE, SIZE, 3)).astype(np.float32)
  with torch.no_grad():
    found = theirs(
      input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels.transpose(2, 0, 1)[None])
    ).logits[0]
  close(run(opened, np.where(ids == IMAGE, 0, ids), pixels[None, None], slots), found)


def same_text_logits(opened: Loaded, theirs: Any, tokens: np.ndarray = TOKENS) -> None:
  """Of a decoder alone."""
  import torch

  with torch.no_grad():
    close(run(completed(opened), tokens), theirs(torch.tensor(tokens)).logits[0])
