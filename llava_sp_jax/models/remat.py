"""Says what a decoder layer keeps for its backward pass; the rest is recomputed.

A frozen base needs no gradients of its kernels, but adapters and the gradient of the activations
need the outputs of the projections. Keeping those avoids recomputing every large matmul.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from llava_sp_jax.models.attention import SAVED, SAVED_PRIMITIVE


def _names(*names: str) -> Callable[..., Any]:
  """Returns a policy that keeps arrays of these names, and the outputs of SAVED_PRIMITIVE."""
  named = jax.checkpoint_policies.save_only_these_names(*names)

  def policy(primitive: Any, *arrays: Any, **parameters: Any) -> Any:
    return primitive.name == SAVED_PRIMITIVE or named(primitive, *arrays, **parameters)

  return policy


_ATTENTION = ("q", "k", "v", SAVED)

# Policies of jax.checkpoint, from the most recomputation to the most memory. `llama.DecoderBlock`
# and `lora` name the arrays: "middle" is the residual stream between attention and MLP, "low" an
# input times LoRA's A.
POLICIES: dict[str, Callable[..., Any]] = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "attention": _names(*_ATTENTION),
  "gates": _names(*_ATTENTION, "gate", "up"),
  "projections": _names(*_ATTENTION, "middle", "low", "gate", "up"),
  "minimal": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "none": jax.checkpoint_policies.everything_saveable,  # no recomputation at all
}


def wrap(block: Any, name: str) -> Any:
  """Returns the module class `block` with rematerialization; `name` is a row of POLICIES.

  Raises: KeyError for another name.
  """
  policy = POLICIES[name]
  return block if name == "none" else nn.remat(block, prevent_cse=False, policy=policy)
