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
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from llava_sp_jax.models import flash_bodies
from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.flash_bodies import LANES

BLOCK = 256  # queries and keys of a tile; if it does not divide T, gcd(T, BLOCK)
ROOM = 2048 * 128  # T x H of a head, the most
SMALL = "TPU v4"  # of which vector memory (16 MiB) holds one such head with its gradients, not two
VECTOR_MEMORY = 48 << 20  # bytes, the most that the kernels ask for
# Names of the kernels in compiled programs, which `plan.kernels` counts.
FORWARD, BACKWARD = "flash_forward", "flash_backward"


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
  names: tuple[str, str, str, str]  # of queries, keys, values and results, for remat policies
  interpret: bool
  rotates: bool = False  # queries and keys by their positions
  most: int = 2  # query heads of a step; 1 where vector memory is small

  @property
  def together(self) -> int:
    """Returns the query heads of a step, A."""
    return 1 if (self.heads if self.shared == 1 else self.shared) % 2 else self.most

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

  @property
  def abreast(self) -> bool:
    """Returns whether heads lie side by side in arrays: [B, T, N H] as products make and read them.

    Otherwise they are [B, N, T, H], because a head must begin at a whole vector register.
    """
    return self.width % LANES == 0

  def arranged(self, x: Any) -> Any:
    """Returns [B, T, N, H] as the kernels read it."""
    return x.reshape(*x.shape[:2], -1) if self.abreast else x.transpose(0, 2, 1, 3)

  def restored(self, x: Any) -> Any:
    """Returns an array of `arranged` as [B, T, N, H]."""
    if self.abreast:
      return x.reshape(*x.shape[:2], -1, self.width)
    return x.transpose(0, 2, 1, 3)

  def of_queries(self) -> pl.BlockSpec:
    """Returns what a step reads of queries."""
    parts = self.parts
    return self._of_heads(self.together, lambda n, g: n * parts + g)

  def of_keys(self) -> pl.BlockSpec:
    """Returns what a step reads of keys or values."""
    return self._of_heads(self.keys_together, lambda n, g: n)

  def _of_heads(self, count: int, number: Any) -> pl.BlockSpec:
    if self.abreast:
      side_by_side = (None, self.length, count * self.width)
      return pl.BlockSpec(side_by_side, lambda b, n, g, _: (b, 0, number(n, g)))
    shape = (None, count, self.length, self.width)
    return pl.BlockSpec(shape, lambda b, n, g, _: (b, number(n, g), 0, 0))

  def of_lines(self) -> pl.BlockSpec:
    """Returns what a step reads of numbers of queries, [B, N, I, Q]."""
    parts = self.parts
    shape = (None, self.together, self.blocks, self.block)
    return pl.BlockSpec(shape, lambda b, n, g, _: (b, n * parts + g, 0, 0))

  def head(self, ref: Any, number: int) -> Any:
    """Returns one of the heads [T, H] of what a step reads."""
    if self.abreast:
      return ref.at[:, number * self.width : (number + 1) * self.width]
    return ref.at[number]

  def of_row(self, *shape: int) -> pl.BlockSpec:
    """Returns what a step reads of an array [B, *shape]."""
    rest = [0] * len(shape)
    return pl.BlockSpec((None, *shape), lambda b, n, g, _: (b, *rest))

  def of_turns(self) -> list[pl.BlockSpec]:
    """Returns what a step reads of the cosines and signed sines of positions, if it rotates."""
    spec = self.of_row(self.length, self.width)
    return [spec] * 2 if self.rotates else []

  def turned(self, dtype: Any) -> list[Any]:
    """Returns the memory for the rotated key heads of a step, if it rotates."""
    shape = (self.keys_together, self.length, self.width)
    return [pltpu.VMEM(shape, dtype)] if self.rotates else []

  def call(self, body: Any, name: str, rows: int, made: Any, scratch: Any, **specs: Any) -> Any:
    """Returns the call of a kernel on a prefetched array of scalars and on arrays of `specs`."""
    # `plan.kernels` reads it.
    told = {"block_q": self.block, "block_kv": self.block, "rotates": int(self.rotates)}
    steps = self.heads // (self.together * self.parts)
    return pl.pallas_call(
      functools.partial(body, self),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(rows, steps, self.parts),
        scratch_shapes=scratch,
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
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  first: Int[Array, "B T"],
  kernel: Kernel,
  angles: tuple[Float[Array, "B T half"], Float[Array, "B T half"]] | None = None,
) -> Float[Array, "B T N H"]:
  """Computes softmax(scale q k^T) v, where each query sees the keys from its `first` to itself.

  `first` is what `first_keys` returns. With `angles`, cosines and sines of positions, queries and
  keys are rotated as by `layers.rotary`; `kernel.rotates` says whether there are any.
  """
  arrays = [
    checkpoint_name(kernel.arranged(x), name)
    for x, name in zip((q, k, v), kernel.names[:3], strict=True)
  ]
  turns = None
  if angles is not None:
    cos, sin = (jax.lax.stop_gradient(x) for x in angles)
    turns = jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)
  # Under jit, rematerialization sees that nothing of the forward kernel is needed again.
  made = jax.jit(_attend, static_argnums=5)(*arrays, first, turns, kernel)
  result: jax.Array = kernel.restored(made)
  return result


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Any, k: Any, v: Any, first: Any, turns: Any, kernel: Kernel) -> Any:
  return _forward(q, k, v, first, turns, kernel)[0]


def _forward(q: Any, k: Any, v: Any, first: Any, turns: Any, kernel: Kernel) -> Any:
  rows, block, blocks, together = len(q), kernel.block, kernel.blocks, kernel.together
  out, norm = kernel.call(
    flash_bodies.forward_kernel,
    FORWARD,
    rows,
    [
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((rows, kernel.heads, blocks, block), jnp.float32),
    ],
    [
      *(pltpu.VMEM((together, block, n), jnp.float32) for n in (LANES, LANES, kernel.width)),
      *kernel.turned(k.dtype),
    ],
    in_specs=[
      *(kernel.of_queries(), kernel.of_keys(), kernel.of_keys()),
      *(kernel.of_row(kernel.length, LANES), *kernel.of_turns()),
    ],
    out_specs=[kernel.of_queries(), kernel.of_lines()],
  )(
    *(first[:, ::block] // block, q, k, v, jnp.repeat(first[..., None], LANES, axis=2)),
    *(turns or ()),
  )
  out, norm = (checkpoint_name(x, kernel.names[3]) for x in (out, norm))
  return out, (q, k, v, first, turns, out, norm)


def _backward(kernel: Kernel, kept: Any, given: Any) -> Any:
  q, k, v, first, turns, out, norm = kept
  rows, block, blocks = len(q), kernel.block, kernel.blocks
  ends = jnp.arange(1, blocks + 1) * block
  seeing = (first[:, None] < ends[:, None]).sum(axis=-1)  # queries up to the last that sees a block
  whole = (kernel.length, kernel.width)
  result = kernel.call(
    flash_bodies.backward_kernel,
    BACKWARD,
    rows,
    [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
    [
      pltpu.VMEM((kernel.together, blocks, block), jnp.float32),
      *(
        pltpu.VMEM((n, *whole), jnp.float32)
        for n in (kernel.together, kernel.keys_together, kernel.keys_together)
      ),
    ],
    in_specs=[
      *(kernel.of_queries(), kernel.of_keys(), kernel.of_keys()),
      *(kernel.of_row(blocks, block), kernel.of_queries(), kernel.of_queries()),
      *(kernel.of_lines(), *kernel.of_turns()),
    ],
    out_specs=[kernel.of_queries(), kernel.of_keys(), kernel.of_keys()],
  )(
    *((seeing + block - 1) // block, q, k, v, first.reshape(rows, blocks, block)),
    *(out, given, norm, *(turns or ())),
  )
  return *result, None, None


_attend.defvjp(_forward, _backward)
