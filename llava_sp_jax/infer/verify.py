"""Compares two forms of a model, such as before and after a merge, by their logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Float32

from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.convert.loaded import Loaded
from llava_sp_jax.models import build
from llava_sp_jax.models.arrays import Array

TOKENS = 64  # text tokens of the prompt, after the tokens of one image
# The largest difference that rounding of kernels explains; a lost adapter causes a far larger one.
BOUNDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Holds the largest difference of two models' logits on one prompt, and how often they agree.

  `dtype` is that of the second model's frozen parameters.
  """

  largest: float  # divided by the largest logit
  same_choice: float  # share of positions with the same most likely token
  dtype: str

  @property
  def within_bounds(self) -> bool:
    """Returns whether rounding of weights to `dtype` explains the difference.

    It does up to 1e-4 of the largest logit for float32, 2e-2 for float16 and 1e-1 for bfloat16.
    """
    return self.largest <= BOUNDS[self.dtype]

  def __str__(self) -> str:
    return (
      f"logits of {self.dtype} differ by at most {self.largest:.1e} of the largest; "
      f"the most likely token is the same at {100 * self.same_choice:.1f}% of the positions"
    )


def compare(before: Loaded, after: Loaded) -> Comparison:
  """Compares the logits of two models on the same random image and tokens, in float32
  arithmetic.
  """
  one, two = (np.asarray(_logits(source), np.float64) for source in (before, after))
  largest = float(np.abs(one - two).max() / np.abs(one).max())
  same = float(np.mean(one.argmax(-1) == two.argmax(-1)))
  stored = after.config.model.frozen_dtype
  return Comparison(largest, same, stored)


def _logits(source: Loaded) -> Float32[Array, "B T V"]:
  model = dataclasses.replace(
    source.config.model, dtype="float32", matmul_precision="auto", remat="none"
  )
  params = {p: jnp.asarray(leaf.read(), jnp.float32) for p, leaf in source.leaves.items()}
  module = build.model(model)
  rng = np.random.default_rng(0)
  images = build.image_token_count(model)
  length = images + TOKENS
  tokens = rng.integers(0, model.language_model.vocab_size, (1, length), dtype=np.int32)
  slots = np.where(np.arange(length) < images, np.arange(length), -1)[None].astype(np.int32)
  side = model.tower.image_size
  pixels = rng.standard_normal((1, 1, side, side, 3), np.float32)
  positions = np.arange(length, dtype=np.int32)[None]

  @jax.jit
  def run(params: Any) -> Any:
    variables = {"params": unflatten_dict(params, sep="/")}
    hidden: Any = module.apply(
      variables, tokens, positions, np.full_like(tokens, BRANCHES), pixels, slots
    )
    return module.apply(variables, hidden[:, images:], method="logits")

  result: jax.Array = run(params)
  return result
