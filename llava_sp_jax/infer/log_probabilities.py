"""Log-probabilities of given tokens: the device's part of `likelihood`.

Shape letters:  B rows . T row length . K tokens of the longest continuation . V vocabulary
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float32, Int, Shaped

from llava_sp_jax.infer.decode import StopRule
from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.llava import LlavaSP


def score(
  module: LlavaSP,
  params: Any,
  batch: dict[str, Shaped[Array, "B ..."]],
  at: Int[Array, "B K"],
  rule: StopRule,
) -> tuple[Float32[Array, "B K"], Bool[Array, "B K"]]:
  """Scores the tokens that follow the positions `at` [B, K] int32.

  `batch` has tokens, positions, segments, slots, targets [B, T] and images [B, M, H, W, 3]. `rule`
  says which ids the tokenizer has.

  Returns: their log-probabilities (natural logarithm) [B, K] float32, and whether each is the most
    likely one [B, K] bool.
  """
  names = ("tokens", "positions", "segments", "images", "slots")
  hidden = module.apply({"params": params}, *(batch[name] for name in names))
  picked = jnp.take_along_axis(hidden, at[..., None], axis=1)
  logits = module.apply({"params": params}, picked, method="logits")
  targets = jnp.take_along_axis(batch["targets"], at, axis=1)
  chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  most_likely = jnp.argmax(rule.possible(logits), axis=-1) == targets
  return chosen - jax.nn.logsumexp(logits, axis=-1), most_likely
