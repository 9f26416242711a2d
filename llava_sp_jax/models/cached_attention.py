"""Computes the attention of new positions to a cache of keys and values, and to themselves.

Shape letters:  B rows . T queries . S keys of the cache . N heads . K key-value heads . H head width
                Q queries of a key head
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.attention import AttentionChoice
from llava_sp_jax.models.cache import Codes, HeldKeys, HeldValues

LOWEST = float(np.finfo(np.float32).min)  # the score of a key that is not seen
# The most queries per key head that are multiplied one by one, when XLA reads keys faster.
ALONE = {"cpu": 4}


def attend_cached(
  spec: AttentionChoice,
  q: Float[Array, "B T N H"],
  cached: tuple[HeldKeys, HeldValues],
  seen: Bool[Array, "B T S"],
  new: tuple[Float[Array, "B K H T"], Float[Array, "B K T H"]],
  mask: Bool[Array, "B T T"],
) -> Float[Array, "B T N H"]:
  """Computes attention to a cache and to the new positions themselves, as one softmax.

  The cache is not joined with the new keys, because that would copy all of it. Nor is one of int8
  dequantized: scales multiply scores and weights, which are smaller.

  Args:
    spec: what is known before tracing.
    q: queries of the T new positions.
    cached: keys [B, K, H, S] and values [B, K, S, H] of the cache, as floats or codes.
    seen: which positions of the cache each query sees.
    new: keys and values of the new positions.
    mask: which new positions each query sees.
  """
  rows, count, heads, width = q.shape
  groups = new[0].shape[1]
  q = q.reshape(rows, count, groups, heads // groups, width).transpose(0, 2, 3, 1, 4)
  q = q.reshape(rows, groups, -1, width)  # [B, K, G T, H]: the queries of a key head are one matmul
  parts = []
  for (held, _), allowed in ((cached, seen), (new, mask)):
    keys, scale = held if isinstance(held, Codes) else (held, None)
    scores = _scores(spec, q, keys.astype(q.dtype)).astype(jnp.float32)
    scores = scores if scale is None else scores * scale
    scores = scores.reshape(rows, groups, -1, count, keys.shape[3]) / math.sqrt(width)
    parts.append(jnp.where(allowed[:, None, None], scores, LOWEST))
  top = jnp.maximum(*(part.max(axis=-1, keepdims=True) for part in parts))
  weights = [jnp.exp(part - top) for part in parts]
  total = sum(part.sum(axis=-1, keepdims=True) for part in weights)
  out = jnp.zeros(q.shape, q.dtype)
  for part, (_, held) in zip(weights, (cached, new), strict=True):
    values, scale = held if isinstance(held, Codes) else (held, None)
    share = part / total
    share = share if scale is None else share * scale.reshape(rows, groups, 1, 1, -1)
    share = share.astype(q.dtype).reshape(*q.shape[:3], -1)
    out = out + jnp.einsum("bkqs,bksh->bkqh", share, values.astype(q.dtype))
  out = out.reshape(rows, groups, -1, count, width).transpose(0, 3, 1, 2, 4)
  return out.reshape(rows, count, heads, width)


def _scores(
  spec: AttentionChoice, q: Float[Array, "B K Q H"], keys: Float[Array, "B K H S"]
) -> Float[Array, "B K Q S"]:
  """Multiplies queries and keys.

  Uses as many products as are fastest on the platform.
  """
  few = ALONE.get(spec.platform or jax.default_backend(), 1)
  several = q.shape[2] if 1 < q.shape[2] <= few else 1
  parts = [jnp.einsum("bkqh,bkhs->bkqs", part, keys) for part in jnp.split(q, several, axis=2)]
  return jnp.concatenate(parts, axis=2) if several > 1 else parts[0]
