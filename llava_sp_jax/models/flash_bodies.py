"""Holds the bodies of the kernels of `flash`: what a step of their grids computes.

Heads are in vector memory as a whole. Arrays end in `_ref`; `kernel` is a `flash.Kernel`.

Shape letters:  T tokens . H head width . A heads of a step
                I blocks of queries . J blocks of keys . Q queries, S keys of a block
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128  # of a vector register; T must be a multiple
LOWEST = float(np.finfo(np.float32).min)
# How two matrices are multiplied: x y, x y^T, x^T y.
PLAIN, SECOND, FIRST = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


def _product(x: Any, y: Any, how: Any) -> Any:
  return jax.lax.dot_general(x, y, how, preferred_element_type=jnp.float32)


def _scaled(q: Any, kernel: Any) -> Any:
  return (q * kernel.scale).astype(q.dtype)  # here, because it is an array of its own outside


def _rotated(x: Any, turns: Any, mine: Any, kernel: Any) -> Any:
  """Rotates some positions of a head, [Q, H], by `turns`; does nothing without any."""
  if not turns:
    return x
  cos, sin = (ref[mine, :] for ref in turns)
  x32 = x.astype(jnp.float32)
  return (x32 * cos + _swapped(x32, kernel) * sin).astype(x.dtype)


def _swapped(x: Any, kernel: Any) -> Any:
  return pltpu.roll(x, kernel.width // 2, 1)  # the halves of a head


def _each_block(kernel: Any, run: Any) -> None:
  jax.lax.fori_loop(0, kernel.blocks, lambda i, _: run(i, _at(i, kernel.block)), None)


def _at(i: Any, block: int) -> Any:
  return pl.ds(pl.multiple_of(i * block, block), block)


def _seen(first: Any, i: Any, j: Any, block: int, axis: int) -> Any:
  """Returns which keys of block j each query of block i sees, with keys along `axis`."""
  key = j * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), axis)
  query = i * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), 1 - axis)
  return (key >= first) & (key <= query)


def forward_kernel(
  kernel: Any, low: Any, q_ref: Any, k_ref: Any, v_ref: Any, first_ref: Any, *rest: Any
) -> None:
  """Computes some heads of a row; all products of a tile before what follows them.

  `low` [B, I] is the first block that a block of queries sees. `first_ref` [T, LANES] and the sums
  of a softmax repeat a number in all lanes. `norm_ref` [A, I, Q] is the logarithm of their totals.
  """
  turns, (out_ref, norm_ref, top, total, summed, *memory) = _parted(kernel, rest)
  row, block, heads = pl.program_id(0), kernel.block, range(kernel.together)
  theirs = [min(h, kernel.keys_together - 1) for h in heads]
  qs, outs = ([kernel.head(ref, h) for h in heads] for ref in (q_ref, out_ref))
  ks, vs = ([kernel.head(ref, h) for h in theirs] for ref in (k_ref, v_ref))
  ks = _turned_keys(kernel, ks, turns, [turned.at[h] for turned in memory for h in theirs])

  def wide(x: Any, width: int) -> Any:
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]

  def queries(i: Any, _: None) -> None:
    mine = _at(i, block)
    top[...] = jnp.full_like(top, LOWEST)
    total[...] = jnp.zeros_like(total)
    summed[...] = jnp.zeros_like(summed)
    q = [_scaled(_rotated(x[mine, :], turns, mine, kernel), kernel) for x in qs]

    def keys(j: Any, _: None) -> None:
      there = _at(j, block)
      seen = _seen(wide(first_ref[mine, :], block), i, j, block, axis=1)
      held = [(top[h], total[h], summed[h]) for h in heads]
      values = [x[there, :] for x in vs]
      scores = [_product(q[h], ks[h][there, :], SECOND) for h in heads]
      scores = [jnp.where(seen, x, LOWEST) for x in scores]
      highest = [jnp.maximum(held[h][0], scores[h].max(axis=1, keepdims=True)) for h in heads]
      weights = [jnp.exp(scores[h] - wide(highest[h], block)) for h in heads]
      more = [_product(weights[h].astype(values[h].dtype), values[h], PLAIN) for h in heads]
      for h in heads:
        shrink = jnp.exp(held[h][0] - highest[h])
        top[h] = highest[h]
        total[h] = shrink * held[h][1] + weights[h].sum(axis=1, keepdims=True)
        summed[h] = wide(shrink, kernel.width) * held[h][2] + more[h]

    jax.lax.fori_loop(low[row, i], i + 1, keys, None)
    for h in heads:
      out = summed[h] * wide(1 / total[h], kernel.width)
      outs[h][mine, :] = out.astype(out_ref.dtype)
      norm_ref[h, pl.ds(i, 1), :] = (top[h] + jnp.log(total[h])).T[:1]

  jax.lax.fori_loop(0, kernel.blocks, queries, None)


def backward_kernel(
  kernel: Any, high: Any, q_ref: Any, k_ref: Any, v_ref: Any, first_ref: Any, out_ref: Any,
  given_ref: Any, norm_ref: Any, *rest: Any,
) -> None:  # fmt: skip
  """Computes the gradients of some heads of a row; sums those of key heads over their query heads.

  Scores have keys along their rows, so numbers of queries are vectors of lanes: `first_ref` [I, Q],
  `norm_ref` [A, I, Q], and `mean`, what the softmax subtracts from the gradient of its logits. `high` [B, J] is the block behind the last queries that see a
  block of keys.
  """
  turns, (dq_ref, dk_ref, dv_ref, mean, dq, dk, dv) = _parted(kernel, rest)
  row, part, block = pl.program_id(0), pl.program_id(2), kernel.block
  heads = range(kernel.together)
  theirs = [min(h, kernel.keys_together - 1) for h in heads]
  qs, outs, givens = ([kernel.head(ref, h) for h in heads] for ref in (q_ref, out_ref, given_ref))
  ks, vs = ([kernel.head(ref, h) for h in theirs] for ref in (k_ref, v_ref))
  # Until the gradients are written at the end, their memory holds what is read for every tile.
  scaled = [kernel.head(dq_ref, h) for h in heads]
  ks = _turned_keys(kernel, ks, turns, [kernel.head(dk_ref, h) for h in theirs])
  dq[...] = jnp.zeros_like(dq)

  def prepare(i: Any, mine: Any) -> None:
    for h in heads:
      scaled[h][mine, :] = _scaled(_rotated(qs[h][mine, :], turns, mine, kernel), kernel)
      both = outs[h][mine, :].astype(jnp.float32) * givens[h][mine, :].astype(jnp.float32)
      mean[h, pl.ds(i, 1), :] = both.T.sum(axis=0, keepdims=True)

  _each_block(kernel, prepare)

  @pl.when(part == 0)
  def _() -> None:
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)

  def keys(j: Any, _: None) -> None:
    there = _at(j, block)

    def queries(i: Any, _: None) -> None:
      mine, line = _at(i, block), pl.ds(i, 1)
      seen = _seen(first_ref[line, :], i, j, block, axis=0)
      q, given = ([x[mine, :] for x in of_heads] for of_heads in (scaled, givens))
      k, v = ([x[there, :] for x in of_heads] for of_heads in (ks, vs))
      scores = [_product(k[h], q[h], SECOND) for h in heads]
      slopes = [_product(v[h], given[h], SECOND) for h in heads]
      weights = [jnp.exp(jnp.where(seen, scores[h], LOWEST) - norm_ref[h, line, :]) for h in heads]
      changes = [weights[h] * (slopes[h] - mean[h, line, :]) for h in heads]
      changes = [change.astype(q_ref.dtype) for change in changes]
      to_v = [_product(weights[h].astype(v[h].dtype), given[h], PLAIN) for h in heads]
      to_k = [_product(changes[h], q[h], PLAIN) for h in heads]
      to_q = [_product(changes[h], k[h], FIRST) for h in heads]
      for h in heads:
        dv[theirs[h], there, :] += to_v[h]
        dk[theirs[h], there, :] += to_k[h]
        dq[h, mine, :] += to_q[h]

    jax.lax.fori_loop(j, high[row, j], queries, None)

  jax.lax.fori_loop(0, kernel.blocks, keys, None)

  def write(ref: Any, h: int, of_head: Any, scale: float, turns: Any) -> None:
    def some(_: Any, mine: Any) -> None:
      x = of_head[h, mine, :] * scale
      if turns:  # the transpose of the rotation
        x = x * turns[0][mine, :] + _swapped(x * turns[1][mine, :], kernel)
      kernel.head(ref, h)[mine, :] = x.astype(ref.dtype)

    _each_block(kernel, some)

  for h in heads:
    write(dq_ref, h, dq, kernel.scale, turns)

  @pl.when(part == kernel.parts - 1)
  def _() -> None:
    for h in range(kernel.keys_together):
      write(dk_ref, h, dk, 1.0, turns)
      write(dv_ref, h, dv, 1.0, ())


def _parted(kernel: Any, rest: Any) -> Any:
  """Returns the cosines and signed sines, if the kernel rotates, and the other references."""
  count = 2 if kernel.rotates else 0
  return rest[:count], rest[count:]


def _turned_keys(kernel: Any, keys: Any, turns: Any, memory: Any) -> Any:
  """Returns the keys of each query head, which the first step that has them rotates into `memory`."""
  if not turns:
    return keys

  @pl.when(pl.program_id(2) == 0)
  def _() -> None:
    def some(_: Any, mine: Any) -> None:
      for h in range(kernel.keys_together):
        memory[h][mine, :] = _rotated(keys[h][mine, :], turns, mine, kernel)

    _each_block(kernel, some)

  return memory
