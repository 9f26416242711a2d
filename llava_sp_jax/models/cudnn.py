"""Calls cuDNN's fused attention on GPUs: with a dense mask, or with the samples of packed rows.

Shape letters:  B rows . T queries and keys . N heads . K key-value heads . H head width . M samples
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from llava_sp_jax.models.arrays import Array

HOPPER = "9.0"  # compute capability; older GPUs have no packed layout
VERSION = 90600  # the first cuDNN with which jax tests that layout
# Arguments of jax's function that the packed layout needs.
PACKED = ("q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets", "mask_type")


def fused_attention() -> Any:
  """Returns jax's module of cuDNN's attention; it is private, so only the packed layout imports it.

  Raises: ImportError with a jax that has moved it.
  """
  from jax._src.cudnn import fused_attention_stablehlo

  return fused_attention_stablehlo


def masked(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  mask: Bool[Array, "B T T"],
) -> Float[Array, "B T N H"]:
  """Computes attention with a dense mask, which becomes a bias of all pairs in memory.

  Gradients need an even T, so an odd one gets a position that nothing attends to.
  """
  length = q.shape[1]
  if odd := length % 2:
    q, k, v = (jnp.pad(x, ((0, 0), (0, odd), (0, 0), (0, 0))) for x in (q, k, v))
    mask = jnp.pad(mask, ((0, 0), (0, odd), (0, odd)))
  out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="cudnn")
  return out[:, :length]


def packed(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T N H"],
  v: Float[Array, "B T N H"],
  segments: Int[Array, "B T"],
  samples: int,
) -> Float[Array, "B T N H"]:
  """Computes causal attention inside each sample of packed rows, and skips all other pairs.

  `samples` is the most samples of a row. Padding is attended to by padding.
  """
  cudnn = fused_attention()
  starts, lengths = runs(segments, samples + 1)  # padding is a run, too
  result: jax.Array = cudnn.dot_product_attention(
    q,
    k,
    v,
    q_seqlen=lengths,
    kv_seqlen=lengths,
    q_offsets=starts,
    kv_offsets=starts,
    scale=1 / math.sqrt(q.shape[-1]),
    mask_type=cudnn.MaskType.PADDING_CAUSAL,
  )
  return result


def runs(segments: Int[Array, "B T"], count: int) -> tuple[Int[Array, "B ends"], Int[Array, "B M"]]:
  """Returns where the runs of equal segments of each row begin, and their lengths; M = `count`.

  Every position is in one of them. -1 stands after the last run of a row.
  """
  length = segments.shape[1]
  before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
  first = segments != before

  def of_row(first: Any) -> Any:
    return jnp.nonzero(first, size=count + 1, fill_value=-1)[0].astype(jnp.int32)

  starts = jax.vmap(of_row)(first)
  ends = jnp.where(starts < 0, length, starts)[:, 1:]
  return starts, jnp.where(starts[:, :-1] < 0, -1, ends - starts[:, :-1])


def lacks_packed() -> str:
  """Returns why jax cannot pack rows on the GPU that it compiles for; "" if it can."""
  try:
    cudnn = fused_attention()
  except ImportError as error:
    return f"jax {jax.__version__} has moved it: {error}"
  known = inspect.signature(cudnn.dot_product_attention).parameters
  if missing := [name for name in PACKED if name not in known]:
    return f"jax {jax.__version__} has no {', '.join(missing)}"
  if not cudnn.check_compute_capability(HOPPER):
    return "the GPU is older than Hopper"
  found = cudnn.check_cudnn_version()
  return f"cuDNN {found} is older than {VERSION}" if found < VERSION else ""
