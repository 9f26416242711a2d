"""Models of few numbers with every kind of parameter, and their leaves."""

from __future__ import annotations

import functools

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.models import build

WIDTH, TOKEN_WIDTH, OUT_WIDTH = 8, 4, 16


def model(
  variant: str,
  rank: int = 0,
  grid: int = 24,
  tower: str = "clip",
  tied: bool = False,
  bias: bool = False,
  quantize: str = "none",
) -> config_lib.ModelConfig:
  """A model of few numbers with every kind of parameter that the variant and tower have."""
  sizes = {"width": OUT_WIDTH, "head_dim": 4, "mlp_width": 24}
  if quantize != "none":
    sizes = {"width": 64, "head_dim": 16, "mlp_width": 128}  # whole blocks
  return config_lib.ModelConfig(
    tower=config_lib.TowerConfig(
      variant=tower,
      image_size=2 * grid,
      patch_size=2,
      width=WIDTH,
      layers=3,
      heads=2,
      mlp_width=12,
    ),
    language_model=config_lib.LanguageModelConfig(
      vocab_size=32,
      layers=2,
      heads=4,
      kv_heads=2,
      tie_embeddings=tied,
      attention_bias=bias,
      **sizes,
    ),
    projector=config_lib.ProjectorConfig(variant=variant, token_width=TOKEN_WIDTH),
    lora=config_lib.LoraConfig(rank=rank),
    image_newline=True,
    quantize=quantize,
  )


def leaves(config: config_lib.ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
  return flatten_dict(build.abstract(config), sep="/")


@functools.cache
def projector_leaves(variant: str, grid: int) -> dict[str, jax.ShapeDtypeStruct]:
  """The leaves of a projector alone, which is quicker than the whole model."""
  module = build.model(model(variant, grid=grid)).projector
  features = jax.ShapeDtypeStruct((1, grid, grid, WIDTH), np.float32)
  tree = jax.eval_shape(module.init, jax.random.key(0), features)["params"]
  return {f"projector/{path}": leaf for path, leaf in flatten_dict(tree, sep="/").items()}
