"""What a decoder layer keeps for its backward pass; the rest is computed again. Rows of POLICIES.

A frozen base needs no gradient of its kernels, but adapters and the gradient of the activations
need what the projections made: keeping that saves every big matmul of the recomputation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from llava_sp_jax.models.attention import SAVED, SAVED_PRIMITIVE


def _names(*names: str) -> Callable[..., Any]:
  """Keeps what has one of these names, and what the attention's primitive makes."""
  named = jax.checkpoint_policies.save_only_these_names(*names)

  def policy(primitive: Any, *arrays: Any, **parameters: Any) -> Any:
    return primitive.name == SAVED_PRIMITIVE or named(primitive, *arrays, **parameters)

  return policy


_ATTENTION = ("q", "k", "v", SAVED)

# A row's policy for jax.checkpoint, from what is computed most to what is kept most. Names are given
# where the arrays are made (`llama.Block`, `lora`): "middle" is the stream between attention and
# MLP, "low" an input times LoRA's A.
POLICIES: dict[str, Callable[..., Any]] = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "attention": _names(*_ATTENTION),
  "gates": _names(*_ATTENTION, "gate", "up"),
  "projections": _names(*_ATTENTION, "middle", "low", "gate", "up"),
  "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "none": jax.checkpoint_policies.everything_saveable,  # no recomputation at all
}


def wrap(block: Any, name: str) -> Any:
  """The module class `block` under the policy `name`. Raises: KeyError for an unknown name."""
  policy = POLICIES[name]
  return block if name == "none" else nn.remat(block, prevent_cse=False, policy=policy)
