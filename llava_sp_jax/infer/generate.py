"""Generation for one batch of static shape: a prefill, then one decode step in a loop.

Shape letters:  B rows . T prompt length . M images per row . N tokens per image . V vocabulary
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llava_sp_jax.data.example import BRANCHES
from llava_sp_jax.infer.sampling import pick
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.models.llava import LlavaSP


def generate(
  module: LlavaSP, params: Any, batch: dict[str, jax.Array], rng: jax.Array, *,
  stop_ids: tuple[int, ...], max_new_tokens: int, temperature: float = 0.0,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
  """Answers of a batch of right-padded prompts.

  `batch` has tokens, positions, segments, slots [B, T] and images [B, M, H, W, 3]. Returns the new
  ids [B, max_new_tokens] and how many of them count (the stop id is not counted) [B].
  """
  apply: Any = functools.partial(module.apply, {"params": params})  # linen's own type is a union
  rows, length = batch["tokens"].shape
  text = module.language_model
  cache = cache_lib.allocate(
    text.layers, rows, length + max_new_tokens, text.kv_heads, text.head_dim, text.dtype
  )
  image = apply(batch["images"], method="encode_image")
  hidden, cache = apply(
    batch["tokens"], batch["positions"], batch["segments"], image, batch["slots"], cache,
    method="extend",
  )  # fmt: skip
  last = jnp.take_along_axis(hidden, (cache.length - 1)[:, None, None], axis=1)
  segment = jnp.full((rows, 1), BRANCHES, jnp.int32)

  def next_token(hidden: jax.Array, number: jax.Array) -> jax.Array:
    logits = apply(hidden[:, -1], method="logits")
    return pick(logits, jax.random.fold_in(rng, number), temperature)

  def is_stop(token: jax.Array) -> jax.Array:
    return jnp.isin(token, jnp.asarray(stop_ids, jnp.int32))

  def going(carry: Any) -> jax.Array:
    number, _, done, *_ = carry
    return (number < max_new_tokens) & ~jnp.all(done)

  def decode(carry: Any) -> Any:
    number, token, done, count, ids, cache = carry
    ids = jax.lax.dynamic_update_index_in_dim(ids, token, number, axis=1)
    count = count + ~done
    hidden, cache = apply(
      token[:, None], cache.length[:, None], segment, None, None, cache, method="extend"
    )
    token = next_token(hidden, number + 1)
    return number + 1, token, done | is_stop(token), count, ids, cache

  first = next_token(last, jnp.zeros((), jnp.int32))
  start = (
    jnp.zeros((), jnp.int32), first, is_stop(first), jnp.zeros((rows,), jnp.int32),
    jnp.zeros((rows, max_new_tokens), jnp.int32), cache,
  )  # fmt: skip
  *_, count, ids, _ = jax.lax.while_loop(going, decode, start)
  return ids, count
