"""Generates answers for one batch of static shape in a single program.

`plan` compiles it, and tests compare it with the engine.

Shape letters:  B rows . T prompt length . M images per row
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jaxtyping import Int, PRNGKeyArray, Shaped

from llava_sp_jax.infer import decode
from llava_sp_jax.infer.sampling import GREEDY, Sampler
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.llava import LlavaSP


def generate(
  module: LlavaSP,
  params: Any,
  batch: dict[str, Shaped[Array, "B ..."]],
  key: PRNGKeyArray,
  *,
  stop_ids: tuple[int, ...],
  max_new_tokens: int,
  sampler: Sampler = GREEDY,
) -> tuple[Int[Array, "B {max_new_tokens}"], Int[Array, " B"]]:
  """Generates answers for right-padded prompts.

  Args:
    module: the model.
    params: its nested parameters.
    batch: tokens, positions, segments, slots [B, T] and images [B, M, H, W, 3].
    key: random key of sampling; not used by a greedy sampler.
    stop_ids: ids that end an answer.
    max_new_tokens: the most tokens of an answer.
    sampler: how a token is chosen.

  Returns: the new ids [B, max_new_tokens], and the length of each answer [B] without its stop id.
  """
  apply: Any = functools.partial(module.apply, {"params": params})  # linen's own type is a union
  strategy = decode.Sampling(decode.StopRule(stop_ids, max_new_tokens, sampler))
  rows, length = batch["tokens"].shape
  text = module.language_model

  def allocate(capacity: int, form: str = cache_lib.FLOAT) -> cache_lib.KVCache:
    return cache_lib.allocate(
      text.layers, rows, capacity, text.kv_heads, text.head_dim, text.dtype, text.stacked, form
    )

  image = apply(batch["images"], method="encode_image")
  hidden, new = apply(
    batch["tokens"],
    batch["positions"],
    batch["segments"],
    image,
    batch["slots"],
    allocate(0),
    method="extend",
  )
  counts = jnp.sum(batch["segments"] > 0, axis=1)
  cache = cache_lib.append(allocate(length + max_new_tokens, text.cache_format), new, counts)
  last = jnp.take_along_axis(hidden, (counts - 1)[:, None, None], axis=1)[:, 0]
  first = strategy.first(apply(last, method="logits"), jnp.arange(rows, dtype=jnp.int32), key)
  state, _ = decode.decode(
    module,
    params,
    decode.State(cache, first),
    key,
    jnp.zeros((rows,), bool),
    jnp.int32(max_new_tokens),
    jnp.int32(rows),
    strategy=strategy,
  )
  return state.rows.ids, state.rows.made
