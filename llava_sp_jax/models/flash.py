"""Computes attention of packed rows on a TPU, and skips the keys that a query does not see.

A query sees the keys from the first one of its sample to itself. Samples are contiguous, so the
first key never decreases along a row, and the tiles that a block of queries or of keys needs are
one range. The kernels loop over that range alone. Heads are in vector memory as a whole, so a tile
that is not needed costs nothing, and all three gradients are summed there.

Shape letters:  B rows . T tokens . N heads . K key-value heads . H head width . A heads of a step
                I blocks of queries . J blocks of keys . Q queries, S keys of a block
Source: Dao 2023, FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from llava_sp_jax.models.arrays import Array

BLOCK = 256  # queries and keys of a tile; if it does not divide T, gcd(T, BLOCK)
LANES = 128  # of a vector register; T must be a multiple
ROOM = 2048 * 128  # T x H of a head; TPU v4 has vector memory for the gradients of two such heads
VECTOR_MEMORY = 48 << 20  # bytes, the most that the kernels ask for
# Names of the kernels in compiled programs, which `plan.kernels` counts.
FORWARD, BACKWARD = "flash_forward", "flash_backward"
LOWEST = float(np.finfo(np.float32).min)
# How two matrices are multiplied: x y, x y^T, x^T y.
PLAIN, SECOND, FIRST = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


def first_keys(segments: Int[Array, "B T"], window: int = 0) -> Int[Array, "B T"]:
  """Returns the index of the first key that each query sees; never decreases along a row.

  Samples are contiguous runs of equal `segments`. A position of padding (segment 0) sees itself
  alone. With a `window`, a query sees at most so many keys.
  """
  index = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1)
  begins = jnp.diff(segments, axis=1, prepend=-1) != 0
  first = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
  if window:
    first = jnp.maximum(first, index - window + 1)
  return jnp.where(segments == 0, index, first)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Holds the static properties of the kernels of one call of `attend`.

  A step of a kernel computes several heads of a row side by side (`together`), so that one has
  exponentials to compute while another waits for its products. If query heads share a key head
  (`shared`), all heads of a step have the same one.
  """

  length: int
  width: int
  heads: int
  shared: int  # query heads that read the same key head
  block: int
  scale: float  # of scores
  name: str  # of the arrays that the backward pass needs, for remat policies
  interpret: bool

  @property
  def together(self) -> int:
    """Returns the query heads of a step, A."""
    return 1 if (self.heads if self.shared == 1 else self.shared) % 2 else 2

  @property
  def keys_together(self) -> int:
    """Returns the key heads of a step."""
    return self.together if self.shared == 1 else 1

  @property
  def parts(self) -> int:
    """Returns the steps that have the same key heads, whose gradients they sum."""
    return max(self.shared // self.together, 1)

  @property
  def blocks(self) -> int:
    """Returns the blocks of a row."""
    return self.length // self.block

  def of_queries(self, *shape: int) -> pl.BlockSpec:
    """Returns what a step reads of an array [B, N, *shape]."""
    parts, rest = self.parts, [0] * len(shape)
    return pl.BlockSpec((None, self.together, *shape), lambda b, n, g, _: (b, n * parts + g, *rest))

  def of_keys(self, *shape: int) -> pl.BlockSpec:
    """Returns what a step reads of an array [B, K, *shape]."""
    rest = [0] * len(shape)
    return pl.BlockSpec((None, self.keys_together, *shape), lambda b, n, g, _: (b, n, *rest))

  def of_row(self, *shape: int) -> pl.BlockSpec:
    """Returns what a step reads of an array [B, *shape]."""
    rest = [0] * len(shape)
    return pl.BlockSpec((None, *shape), lambda b, n, g, _: (b, *rest))

  def call(self, body: Any, name: str, rows: int, made: Any, scratch: Any, **specs: Any) -> Any:
    """Returns the call of a kernel on a prefetched array of scalars and on arrays of `specs`."""
    told = {"block_q": self.block, "block_kv": self.block}  # `plan.kernels` reads it
    steps = self.heads // (self.together * self.parts)
    return pl.pallas_call(
      functools.partial(body, self),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(rows, steps, self.parts),
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        **specs,
      ),
      out_shape=made,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("arbitrary", "parallel", "arbitrary"), vmem_limit_bytes=VECTOR_MEMORY
      ),
      name=name,
      interpret=self.interpret,
      metadata={"xprof_metadata": json.dumps(told)},
    )


def attend(
  q: Float[Array, "B N T H"],
  k: Float[Array, "B K T H"],
  v: Float[Array, "B K T H"],
  first: Int[Array, "B T"],
  kernel: Kernel,
) -> Float[Array, "B N T H"]:
  """Computes softmax(scale q k^T) v, where each query sees the keys from its `first` to itself.

  `first` is what `first_keys` returns.
  """
  # Under jit, rematerialization sees that nothing of the forward kernel is needed again.
  result: jax.Array = jax.jit(_attend, static_argnums=4)(q, k, v, first, kernel)
  return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Any, k: Any, v: Any, first: Any, kernel: Kernel) -> Any:
  return _forward(q, k, v, first, kernel)[0]


def _forward(q: Any, k: Any, v: Any, first: Any, kernel: Kernel) -> Any:
  rows, block, blocks, together = len(q), kernel.block, kernel.blocks, kernel.together
  whole = (kernel.length, kernel.width)
  out, norm = kernel.call(
    _forward_kernel,
    FORWARD,
    rows,
    [
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((*q.shape[:2], blocks, block), jnp.float32),
    ],
    [(together, block, LANES), (together, block, LANES), (together, block, kernel.width)],
    in_specs=[
      *(kernel.of_queries(*whole), kernel.of_keys(*whole), kernel.of_keys(*whole)),
      kernel.of_row(kernel.length, LANES),
    ],
    out_specs=[kernel.of_queries(*whole), kernel.of_queries(blocks, block)],
  )(first[:, ::block] // block, q, k, v, jnp.repeat(first[..., None], LANES, axis=2))
  out, norm = checkpoint_name(out, kernel.name), checkpoint_name(norm, kernel.name)
  return out, (q, k, v, first, out, norm)


def _backward(kernel: Kernel, kept: Any, given: Any) -> Any:
  q, k, v, first, out, norm = kept
  rows, block, blocks = len(q), kernel.block, kernel.blocks
  # What the softmax subtracts from the gradient of its logits, for each query.
  mean = jnp.einsum("bnth,bnth->bnt", out, given, preferred_element_type=jnp.float32)
  ends = jnp.arange(1, blocks + 1) * block
  seeing = (first[:, None] < ends[:, None]).sum(axis=-1)  # queries up to the last that sees a block
  whole, lines = (kernel.length, kernel.width), kernel.of_queries(blocks, block)
  result = kernel.call(
    _backward_kernel,
    BACKWARD,
    rows,
    [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
    [(n, *whole) for n in (kernel.together, kernel.keys_together, kernel.keys_together)],
    in_specs=[
      *(kernel.of_queries(*whole), kernel.of_keys(*whole), kernel.of_keys(*whole)),
      *(kernel.of_row(blocks, block), kernel.of_queries(*whole), lines, lines),
    ],
    out_specs=[kernel.of_queries(*whole), kernel.of_keys(*whole), kernel.of_keys(*whole)],
  )(
    *((seeing + block - 1) // block, q, k, v, first.reshape(rows, blocks, block)),
    *(given, norm, mean.reshape(norm.shape)),
  )
  return *result, None


_attend.defvjp(_forward, _backward)


def _product(x: Any, y: Any, how: Any) -> Any:
  return jax.lax.dot_general(x, y, how, preferred_element_type=jnp.float32)


def _scaled(q: Any, kernel: Kernel) -> Any:
  return (q * kernel.scale).astype(q.dtype)  # here, because it is an array of its own outside


def _at(i: Any, block: int) -> Any:
  return pl.ds(pl.multiple_of(i * block, block), block)


def _seen(first: Any, i: Any, j: Any, block: int, axis: int) -> Any:
  """Returns which keys of block j each query of block i sees, with keys along `axis`."""
  key = j * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), axis)
  query = i * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), 1 - axis)
  return (key >= first) & (key <= query)


def _forward_kernel(
  kernel: Kernel, low: Any, q_ref: Any, k_ref: Any, v_ref: Any, first_ref: Any, out_ref: Any,
  norm_ref: Any, top: Any, total: Any, summed: Any,
) -> None:  # fmt: skip
  """Computes some heads of a row, [A, T, H]; all products of a tile before what follows them.

  `low` [B, I] is the first block that a block of queries sees. `first_ref` [T, LANES] and the sums
  of a softmax repeat a number in all lanes. `norm_ref` [A, I, Q] is the logarithm of their totals.
  """
  row, block, heads = pl.program_id(0), kernel.block, range(kernel.together)
  theirs = [min(h, kernel.keys_together - 1) for h in heads]

  def wide(x: Any, width: int) -> Any:
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]

  def queries(i: Any, _: None) -> None:
    mine = _at(i, block)
    top[...] = jnp.full_like(top, LOWEST)
    total[...] = jnp.zeros_like(total)
    summed[...] = jnp.zeros_like(summed)
    q = [_scaled(q_ref[h, mine, :], kernel) for h in heads]

    def keys(j: Any, _: None) -> None:
      there = _at(j, block)
      seen = _seen(wide(first_ref[mine, :], block), i, j, block, axis=1)
      held = [(top[h], total[h], summed[h]) for h in heads]
      values = [v_ref[theirs[h], there, :] for h in heads]
      scores = [_product(q[h], k_ref[theirs[h], there, :], SECOND) for h in heads]
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
      out_ref[h, mine, :] = out.astype(out_ref.dtype)
      norm_ref[h, pl.ds(i, 1), :] = (top[h] + jnp.log(total[h])).T[:1]

  jax.lax.fori_loop(0, kernel.blocks, queries, None)


def _backward_kernel(
  kernel: Kernel, high: Any, q_ref: Any, k_ref: Any, v_ref: Any, first_ref: Any, given_ref: Any,
  norm_ref: Any, mean_ref: Any, dq_ref: Any, dk_ref: Any, dv_ref: Any, dq: Any, dk: Any, dv: Any,
) -> None:  # fmt: skip
  """Computes the gradients of some heads of a row; sums those of key heads over their query heads.

  Scores have keys along their rows, so numbers of queries are vectors of lanes: `first_ref` [I, Q],
  `norm_ref` and `mean_ref` [A, I, Q]. `high` [B, J] is the block behind the last queries that see a
  block of keys.
  """
  row, part, block = pl.program_id(0), pl.program_id(2), kernel.block
  heads = range(kernel.together)
  theirs = [min(h, kernel.keys_together - 1) for h in heads]
  dq[...] = jnp.zeros_like(dq)

  @pl.when(part == 0)
  def _() -> None:
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)

  def keys(j: Any, _: None) -> None:
    there = _at(j, block)

    def queries(i: Any, _: None) -> None:
      mine, line = _at(i, block), pl.ds(i, 1)
      seen = _seen(first_ref[line, :], i, j, block, axis=0)
      q, given = ([ref[h, mine, :] for h in heads] for ref in (q_ref, given_ref))
      q = [_scaled(x, kernel) for x in q]
      k, v = ([ref[theirs[h], there, :] for h in heads] for ref in (k_ref, v_ref))
      scores = [_product(k[h], q[h], SECOND) for h in heads]
      slopes = [_product(v[h], given[h], SECOND) for h in heads]
      weights = [jnp.exp(jnp.where(seen, scores[h], LOWEST) - norm_ref[h, line, :]) for h in heads]
      changes = [weights[h] * (slopes[h] - mean_ref[h, line, :]) for h in heads]
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
  dq_ref[...] = (dq[...] * kernel.scale).astype(dq_ref.dtype)

  @pl.when(part == kernel.parts - 1)
  def _() -> None:
    dk_ref[...] = dk[...].astype(dk_ref.dtype)
    dv_ref[...] = dv[...].astype(dv_ref.dtype)
