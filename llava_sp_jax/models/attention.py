"""Computes the decoder's attention by one of a table of implementations, and chooses which.

Each implementation lists its objections: what it cannot compute exactly. "auto" takes the first one
of the platform without an objection. An implementation that is named and objects is an error, so
there is no silent fallback.

Shape letters:  B rows . T queries . S keys . N heads . K key-value heads . H head width
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from llava_sp_jax.models import cudnn, flash, layers, shares
from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.flash_bodies import LANES

# What remat policies keep of an implementation, each array once: arrays of this name (the output,
# and splash's log-sum-exp), or all outputs of this primitive (the same for cuDNN, which names no
# arrays).
SAVED = "attention"
INPUTS = ("q", "k", "v")  # names of what an implementation reads
SAVED_PRIMITIVE = "dot_product_attention_fwd_wrapper"
BLOCK = 512  # queries and keys per tile of the kernel; if it does not divide T, gcd(T, BLOCK)

Angles = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]


@dataclasses.dataclass(frozen=True)
class AttentionChoice:
  """Holds what is known of the attention before it is traced; a field of the decoder.

  `platform` is that of the devices it is compiled for, which may be absent ("" is where jax runs).
  `branches` says whether samples may have branches (`batch.BRANCHES`). Without branches, a sample
  is one contiguous run of its row, with positions that increase by one.
  """

  name: str = "auto"  # "auto", or a row of IMPLEMENTATIONS
  platform: str = ""
  branches: bool = True
  samples: int = 0  # the most samples of a row; 0: any number
  window: int = 0  # sliding window of every layer; 0: none
  mixed_layers: bool = False  # only some layers have a window
  precision: str = ""  # `LlavaSP.precision`, with which it is traced


@dataclasses.dataclass(frozen=True)
class Case:
  """Holds the static properties of one call of attention.

  `length` is the number of queries T. `cached` says that keys come from a cache.
  """

  spec: AttentionChoice
  length: int
  head_dim: int
  dtype: DTypeLike
  cached: bool
  split: tuple[int, int, int]  # rows, heads, key-value heads per device; 0: not divisible

  @property
  def platform(self) -> str:
    """Returns the platform that the program is compiled for, such as "tpu"."""
    return self.spec.platform or jax.default_backend()


@dataclasses.dataclass(frozen=True)
class Implementation:
  """Holds one implementation of attention.

  `run(case, q, k, v, mask, segments)` computes it. `objections(case)` returns why it cannot compute
  a case, as texts; [] if it can. If it `rotates(case)`, `run` takes `angles`, and rotates queries and
  keys itself.
  """

  run: Callable[..., jax.Array]
  objections: Callable[[Case], list[str]]
  rotates: Callable[[Case], bool] = lambda case: False


def attend(
  spec: AttentionChoice,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Bool[Array, "B T S"],
  segments: Int[Array, "B T"] | None,
  angles: Angles | None = None,
) -> Float[Array, "B T N H"]:
  """Computes masked attention by the implementation that `choose` names.

  Args:
    spec: what is known before tracing.
    q, k, v: queries, keys and values.
    mask: which keys each query sees; defines the result.
    segments: of the positions, when keys and queries are the same ones; None when the keys come
      from a cache.
    angles: cosines and sines by which queries and keys are rotated; None if they have been.

  Rows of padding (segment 0) hold finite values without meaning.

  Raises: ValueError when `spec` names an implementation that cannot compute this.
  """
  case = Case(spec, q.shape[1], q.shape[3], q.dtype, segments is None, shares.sizes(q, k))
  implementation = IMPLEMENTATIONS[choose(case)]
  if angles is not None and implementation.rotates(case):
    return implementation.run(case, q, k, v, mask, segments, angles)
  if angles is not None:
    q, k = (layers.rotary(x, *angles) for x in (q, k))
  q, k, v = (checkpoint_name(x, name) for x, name in zip((q, k, v), INPUTS, strict=True))
  return implementation.run(case, q, k, v, mask, segments)


def choose(case: Case) -> str:
  """Returns the name, in IMPLEMENTATIONS, of the implementation that computes `case`.

  Raises: ValueError when `case.spec` names one that cannot compute it.
  """
  name = case.spec.name
  if name == "auto":
    order = PLATFORMS.get(case.platform, ("xla",))
    return next(row for row in order if not IMPLEMENTATIONS[row].objections(case))
  if reasons := IMPLEMENTATIONS[name].objections(case):
    raise ValueError(
      f"model.attention {name!r} cannot compute this: {'; '.join(reasons)}; use 'auto' or 'xla'"
    )
  return name


def _xla(
  case: Case,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Bool[Array, "B T S"],
  segments: Int[Array, "B T"] | None,
) -> Float[Array, "B T N H"]:
  result: jax.Array = checkpoint_name(layers.attend(q, k, v, mask), SAVED)
  return result


def _cudnn(
  case: Case,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Bool[Array, "B T S"],
  segments: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
  return cudnn.masked(q, k, v, mask)


def _cudnn_objections(case: Case) -> list[str]:
  checks = {
    f"platform {case.platform} has no cuDNN": case.platform not in ("gpu", "cuda"),
    "the keys come from a cache": case.cached,
    f"dtype {jnp.dtype(case.dtype).name} is not float16 or bfloat16": jnp.dtype(case.dtype).itemsize
    != 2,
    f"head width {case.head_dim} is not a multiple of 8 up to 128": case.head_dim % 8 != 0
    or case.head_dim > 128,
  }
  return [reason for reason, found in checks.items() if found]


def _cudnn_packed(
  case: Case,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Bool[Array, "B T S"],
  segments: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
  """Runs cuDNN on the samples of packed rows, each device on its rows and heads.

  Makes its mask from `segments`; `mask` is not read.
  """
  return shares.on_each_device(functools.partial(cudnn.packed, samples=case.spec.samples), 2)(
    q, k, v, segments
  )


def _cudnn_packed_objections(case: Case) -> list[str]:
  checks = {
    "samples may have branches, which also see their trunk": case.spec.branches,
    "any number of samples may share a row (data.samples_per_row)": not case.spec.samples,
    "layers have a sliding window": bool(case.spec.window),
    "query heads share key heads": case.split[1] != case.split[2],  # jax's offsets are wrong then
    "rows or heads do not divide over their mesh axes": 0 in case.split,
  }
  found = _cudnn_objections(case) + [reason for reason, found in checks.items() if found]
  lacks = "" if found else cudnn.lacks_packed()  # asks the GPU, if there is one
  return [*found, lacks] if lacks else found


def _splash_objections(case: Case) -> list[str]:
  checks = {
    f"platform {case.platform} has no Pallas kernels for TPUs": case.platform
    not in ("tpu", "cpu"),  # on a CPU they are interpreted: slow, for tests
    "the keys come from a cache": case.cached,
    "samples may have branches, which also see their trunk": case.spec.branches,
    "only some layers have a sliding window": case.spec.mixed_layers,
    f"row length {case.length} is not a multiple of {LANES}": case.length % LANES != 0,
    f"its gradients are not made with matmul_precision {case.spec.precision!r}": bool(
      case.spec.precision
    )
    and case.platform == "tpu",  # a CPU multiplies float32 exactly
    "rows or heads do not divide over their mesh axes": 0 in case.split,
  }
  return [reason for reason, found in checks.items() if found]


def _splash(
  case: Case,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Bool[Array, "B T S"],
  segments: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
  """Runs jax's Pallas kernel; interpreted without a TPU.

  A query attends to earlier keys of its own segment, and with a window only to the nearest ones.
  The kernel makes that mask itself; `mask` is not read. The window counts indices of the row. That
  equals counting positions, because here every sample is contiguous.
  """
  length = case.length
  block = math.gcd(length, BLOCK)
  # One fused kernel for all three gradients has 5 products instead of 7, and sums dq over tiles of
  # keys.
  keys = math.gcd(length, 2 * block)
  sizes = splash.BlockSizes(
    block_q=block,
    block_kv=block,
    block_q_dkv=block,
    block_kv_dkv=keys,
    block_kv_dkv_compute=block,
    use_fused_bwd_kernel=True,
  )

  def local(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
  ) -> Float[Array, "B T N H"]:
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    shape = (length, length)
    one = (
      splash_mask.LocalMask(shape, (case.spec.window - 1, 0), 0)
      if case.spec.window
      else splash_mask.CausalMask(shape)
    )
    kernel = splash.make_splash_mha_single_device(
      splash_mask.MultiHeadMask([one] * q.shape[1]),
      block_sizes=sizes,
      residual_checkpoint_name=SAVED,
      interpret=case.platform == "cpu",
    )
    q = q * jnp.asarray(1 / math.sqrt(case.head_dim), q.dtype)
    result: jax.Array = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
    return result.transpose(0, 2, 1, 3)

  return shares.on_each_device(local, 2)(q, k, v, segments)


def _flash(
  case: Case,
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Bool[Array, "B T S"],
  segments: Int[Array, "B T"],
  angles: Angles | None = None,
) -> Float[Array, "B T N H"]:
  """Runs the kernels of `flash`, with the mask of `_splash`; interpreted without a TPU."""

  def local(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    *angles: Float[Array, "B T half"],
  ) -> Float[Array, "B T N H"]:
    kernel = flash.Kernel(
      length=case.length,
      width=case.head_dim,
      heads=q.shape[2],
      shared=q.shape[2] // k.shape[2],
      block=math.gcd(case.length, flash.BLOCK),
      scale=1 / math.sqrt(case.head_dim),
      names=(*INPUTS, SAVED),
      interpret=case.platform == "cpu",
      rotates=bool(angles),
      most=1 if shares.device_kind() == flash.SMALL else 2,
    )
    first = flash.first_keys(segments, case.spec.window)
    turned = (angles[0], angles[1]) if angles else None
    return flash.attend(q, k, v, first, kernel, turned)

  return shares.on_each_device(local, 2)(q, k, v, segments, *(angles or ()))


def _flash_objections(case: Case) -> list[str]:
  most = flash.ROOM // max(case.head_dim, LANES)  # a narrower head takes as much vector memory
  long = [f"row length {case.length} is more than {most}"] if case.length > most else []
  return [*_splash_objections(case), *long]


IMPLEMENTATIONS = {
  "xla": Implementation(_xla, lambda case: []),
  "flash": Implementation(_flash, _flash_objections, lambda case: case.head_dim % LANES == 0),
  "splash": Implementation(_splash, _splash_objections),
  "cudnn_packed": Implementation(_cudnn_packed, _cudnn_packed_objections),
  "cudnn": Implementation(_cudnn, _cudnn_objections),
}

# The implementations that "auto" tries on a platform, in this order.
PLATFORMS = {
  "cpu": ("xla",),
  "tpu": ("flash", "splash", "xla"),
  "gpu": ("cudnn_packed", "cudnn", "xla"),
  "cuda": ("cudnn_packed", "cudnn", "xla"),
}
