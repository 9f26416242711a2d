"""Computes the bytes that a decoding step has to read: weights of the decoder, keys and values."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.models import build
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.models.quantize import is_quantized
from llava_sp_jax.plan.answers import folded


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Holds the bytes that decoding reads from the memory of all devices together."""

  weights: int  # in a step, whatever the number of rows
  position: int  # in a step, for each earlier position of each row: its keys and values

  def step(self, rows: int, positions: int) -> int:
    """Returns the bytes that a step reads for `rows` rows of so many positions each."""
    return self.weights + rows * positions * self.position


def of(config: config_lib.ModelConfig) -> Traffic:
  """Returns the traffic of a model as the engine holds it, by dtype, quantize and cache of its config.

  Adapters of a base in floats are in its weights. Each weight is read once in a step. Of an embedding that is not also the output head, a step reads
  a row for each token, which is left out.
  """
  config = folded(config)
  text, dtype = config.language_model, jnp.dtype(config.dtype)
  unread = () if text.tie_embeddings else ("language_model/token_embed/",)
  weights = 0
  for path, leaf in flatten_dict(build.abstract(config), sep="/").items():
    if path.startswith("language_model/") and not path.startswith(unread):
      weights += leaf.size * (leaf.dtype if is_quantized(path) else dtype).itemsize
  kept = jax.eval_shape(
    lambda: cache_lib.allocate(
      text.layers, 1, 1, text.kv_heads, text.head_dim, dtype, form=config.cache
    )
  )
  held = jax.tree.leaves((kept.keys, kept.values))
  return Traffic(weights, sum(math.prod(x.shape) * x.dtype.itemsize for x in held))
