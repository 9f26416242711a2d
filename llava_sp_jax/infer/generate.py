"""Generates greedy answers for one batch of static shape in a single program.

It is what the engine and the original are compared with.

Shape letters:  B rows . T prompt length . M images per row
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int, Shaped

from llava_sp_jax.infer import decode, row_settings
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.llava import LlavaSP


def generate(
  module: LlavaSP,
  params: Any,
  batch: dict[str, Shaped[Array, "B ..."]],
  *,
  stop_ids: tuple[int, ...],
  max_new_tokens: int,
) -> tuple[Int[Array, "B {max_new_tokens}"], Int[Array, " B"]]:
  """Generates answers for right-padded prompts.

  Args:
    module: the model.
    params: its nested parameters.
    batch: tokens, positions, segments, slots [B, T] and images [B, M, H, W, 3].
    stop_ids: ids that end an answer.
    max_new_tokens: the most tokens of an answer.

  Returns: the new ids [B, max_new_tokens], and the length of each answer [B] without its stop id.
  """
  apply: Any = functools.partial(module.apply, {"params": params})  # linen's own type is a union
  rows, length = batch["tokens"].shape
  text = module.language_model
  strategy = decode.Sampling(decode.StopRule(stop_ids, max_new_tokens, text.vocab_size))
  greedy = [Generation(max_new_tokens=max_new_tokens)] * rows
  settings = row_settings.of(greedy, range(rows), [None] * rows, stop_ids, text.vocab_size)

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
  first = strategy.first(apply(last, method="logits"), jax.tree.map(jnp.asarray, settings))
  state, _ = decode.decode(
    module,
    params,
    decode.State(cache, first),
    jnp.zeros((rows,), bool),
    jnp.int32(max_new_tokens),
    jnp.int32(rows),
    strategy=strategy,
  )
  return state.rows.ids, state.rows.made
