"""Quantizes the weights of frozen kernels: int8, fp8, int4 and NF4 (QLoRA), as a table of formats.

The leaves of a quantized kernel have the kernel's own path: `kernel` becomes `kernel_q`, the codes,
and `kernel_scale...`. All have two axes that run along those of the kernel, so that one row of the
sharding table places them all.

`qwix` is not used. Its providers act through interceptors, whose context is not part of jit's cache
key, and quantizing weights under `nn.scan` failed (0.1.8). Its arithmetic (`qwix.quantize`) does
not quantize the scales, and needs jax arrays where loading has numpy slices of files. Adapting it
takes more code than writing it.

Shape letters:  I inputs of the kernel (contracted) . O outputs . N blocks along I
                S values per block
Source: Dettmers et al. 2023, QLoRA (arXiv 2305.14314), section 3 and appendix E.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Float, Float32, Shaped, UInt8

# Arrays of `Any` are numpy's while loading, jax's in the model.
Leaves = dict[str, Shaped[Any, "_N O"]]

BFLOAT16 = jnp.dtype("bfloat16")

# Quantiles of the standard normal, scaled to [-1, 1], with an exact zero (QLoRA, appendix E).
NF4_LEVELS = (
  -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
  -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
  0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
  0.7229568362236023, 1.0,
)  # fmt: skip


def _namespace(x: Shaped[Any, " ..."]) -> Any:
  """Returns numpy for numpy arrays, else jax.numpy, so that loading does not use a device."""
  return np if isinstance(x, np.ndarray) else jnp


INT8, FP8 = jnp.dtype("int8"), jnp.dtype("float8_e4m3fn")
# The dtypes of symmetric codes: the largest one, and how values are rounded before they are cast.
LARGEST: dict[Any, float] = {INT8: 127.0, FP8: 448.0}


def symmetric(
  x: Float32[Any, "*B"], axis: int, dtype: Any = INT8
) -> tuple[Shaped[Any, "*B"], Float32[Any, " ..."]]:
  """Returns codes of `dtype` (a key of LARGEST) of float32 values, and their scale.

  The largest magnitude along `axis` becomes the largest code. The scale has size 1 along `axis`.
  """
  xp = _namespace(x)
  top = xp.max(xp.abs(x), axis=axis, keepdims=True)
  # A product, because XLA turns a division by a constant into one, but numpy does not.
  scale = xp.where(top > 0, top * np.float32(1 / LARGEST[dtype]), np.float32(1))
  codes = x / scale
  return (xp.rint(codes) if dtype == INT8 else codes).astype(dtype), scale


@dataclasses.dataclass(frozen=True)
class Symmetric:
  """Quantizes symmetrically to code * scale, with scale = largest magnitude / largest code.

  Each output has one scale for all of its inputs, or one for each `block` of them.
  """

  block: int = 0  # 0: one scale for each output
  codes: Any = INT8  # dtype of the codes, a key of LARGEST
  packed: int = 1  # values in one row of `kernel_q`
  whole: bool = dataclasses.field(init=False)  # a slice needs all inputs of its outputs

  def __post_init__(self) -> None:
    object.__setattr__(self, "whole", not self.block)

  def quantize(self, kernel: Float[Any, "I O"]) -> Leaves:
    """Quantizes a kernel into kernel_q [I, O], kernel_scale float32 [N, O]."""
    rows = self.block or kernel.shape[0]
    blocks = kernel.astype(np.float32).reshape(-1, rows, kernel.shape[1])
    codes, scale = symmetric(blocks, 1, self.codes)
    return {"kernel_q": codes.reshape(kernel.shape), "kernel_scale": scale[:, 0]}

  def dequantize(
    self, leaves: Mapping[str, Shaped[Any, "_N O"]], dtype: DTypeLike
  ) -> Float[Any, "I O"]:
    """Returns the kernel [I, O] from its arrays; products are float32, rounded once to `dtype`."""
    codes, scale = leaves["kernel_q"], leaves["kernel_scale"]
    blocks = codes.reshape(len(scale), -1, codes.shape[1]).astype(np.float32)
    return (blocks * scale[:, None]).reshape(codes.shape).astype(dtype)


@dataclasses.dataclass(frozen=True)
class NF4:
  """Quantizes blocks of an output's inputs, divided by their largest magnitude, to nearest levels.

  Two codes share a byte (`_pack`). With `double`, the scales of an output are themselves int8
  around the middle of their range. (In the paper, a second block has 256 scales of any outputs.
  Here it has those of one output, which keeps every slice of a kernel independent of the others.)
  """

  block: int = 64
  double: bool = False
  packed: int = 2

  @property
  def whole(self) -> bool:
    """Returns whether quantizing a slice of a kernel needs all inputs of its outputs."""
    return self.double

  def quantize(self, kernel: Float[Any, "I O"]) -> Leaves:
    """Quantizes a kernel into kernel_q uint8 [I/2, O], kernel_scale float32 [N, O].

    With `double`: kernel_scale int8 [N, O], kernel_scale_scale and kernel_scale_middle float32 [1,
    O].
    """
    xp, columns = _namespace(kernel), kernel.shape[1]
    blocks = kernel.astype(np.float32).reshape(-1, self.block, columns)
    scale = xp.max(xp.abs(blocks), axis=1)
    leaves = {"kernel_scale": scale}
    if self.double:
      low, high = (end(scale, axis=0, keepdims=True) for end in (xp.min, xp.max))
      middle = (low + high) * np.float32(0.5)
      codes, step = symmetric(scale - middle, 0)
      leaves = {"kernel_scale": codes, "kernel_scale_scale": step, "kernel_scale_middle": middle}
      scale = self._scale(leaves)
    divisor = xp.where(scale > 0, scale, np.float32(1))
    return {"kernel_q": _pack(_nearest(blocks / divisor[:, None])), **leaves}

  def dequantize(
    self, leaves: Mapping[str, Shaped[Any, "_N O"]], dtype: DTypeLike
  ) -> Float[Any, "I O"]:
    """Returns the kernel [I, O] from its arrays; products are float32, rounded once to `dtype`."""
    values = _levels(_unpack(leaves["kernel_q"], self.block)) * self._scale(leaves)[:, None]
    return values.reshape(-1, values.shape[2]).astype(dtype)

  def _scale(self, leaves: Mapping[str, Shaped[Any, "_N O"]]) -> Float32[Any, "N O"]:
    scale = leaves["kernel_scale"]
    if not self.double:
      return scale
    wide = scale.astype(np.float32) * leaves["kernel_scale_scale"]
    return wide + leaves["kernel_scale_middle"]


@dataclasses.dataclass(frozen=True)
class Int4:
  """Quantizes blocks of an output's inputs to 16 even levels, from their smallest to their largest.

  A value is low + code * scale. `low` and `scale` are rounded to bfloat16 before the nearest codes
  are chosen, so the codes make up for that rounding. Two codes share a byte (`_pack`).
  """

  block: int = 32
  packed: int = 2
  whole: bool = dataclasses.field(default=False, init=False)

  def quantize(self, kernel: Float[Any, "I O"]) -> Leaves:
    """Quantizes a kernel into kernel_q uint8 [I/2, O], kernel_scale and kernel_low bfloat16 [N, O]."""
    xp = _namespace(kernel)
    blocks = kernel.astype(np.float32).reshape(-1, self.block, kernel.shape[1])
    low, high = xp.min(blocks, axis=1), xp.max(blocks, axis=1)
    scale = ((high - low) * np.float32(1 / 15)).astype(BFLOAT16)
    low = low.astype(BFLOAT16)
    step, first = (x.astype(np.float32)[:, None] for x in (scale, low))
    steps = (blocks - first) / xp.where(step > 0, step, np.float32(1))
    codes = xp.clip(xp.rint(steps), 0, 15).astype(np.uint8)
    return {"kernel_q": _pack(codes), "kernel_scale": scale, "kernel_low": low}

  def dequantize(
    self, leaves: Mapping[str, Shaped[Any, "_N O"]], dtype: DTypeLike
  ) -> Float[Any, "I O"]:
    """Returns the kernel [I, O] from its arrays; sums are float32, rounded once to `dtype`."""
    scale, low = (leaves[f"kernel_{name}"].astype(np.float32)[:, None] for name in ("scale", "low"))
    values = _unpack(leaves["kernel_q"], self.block).astype(np.float32) * scale + low
    return values.reshape(-1, values.shape[2]).astype(dtype)


def _pack(codes: UInt8[Any, "N S O"]) -> UInt8[Any, "_I O"]:
  """Joins values s and s + S/2 of a block in one byte, so that unpacking needs no shuffle."""
  half = codes.shape[1] // 2
  return (codes[:, :half] | (codes[:, half:] << 4)).reshape(-1, codes.shape[2])


def _unpack(packed: UInt8[Any, "_I O"], block: int) -> UInt8[Any, "N {block} O"]:
  """Returns the codes of blocks of S = `block` values, the inverse of `_pack`."""
  halves = packed.reshape(-1, block // 2, packed.shape[1])
  return _namespace(packed).concatenate([halves & 15, halves >> 4], axis=1)


def _nearest(x: Float32[Any, "*B"]) -> UInt8[Any, "*B"]:
  """Returns the codes of the nearest levels; of two equally near ones, the lower."""
  levels = np.asarray(NF4_LEVELS, np.float32)
  middles = (levels[1:] + levels[:-1]) / 2
  codes = _namespace(x).zeros(x.shape, np.uint8)
  for middle in middles:  # 15 passes are faster than a binary search for each value
    codes += x > middle
  return codes


def _levels(codes: UInt8[Any, "*B"]) -> Float32[Any, "*B"]:
  """Returns the levels of codes, by selects in jax because TPUs gather slowly."""
  if isinstance(codes, np.ndarray):
    return np.asarray(NF4_LEVELS, np.float32)[codes]
  values: list[Any] = [np.float32(level) for level in NF4_LEVELS]
  for bit in range(4):
    odd = (codes >> bit) & 1 == 1
    values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2], strict=True)]
  return values[0]


Format = Symmetric | Int4 | NF4

NONE = "none"
FORMATS: dict[str, Format | None] = {
  NONE: None,
  "int8": Symmetric(),
  "int8_block": Symmetric(block=64),
  "fp8": Symmetric(codes=FP8),
  "int4": Int4(),
  "int4_64": Int4(block=64),
  "nf4": NF4(),
  "nf4_double": NF4(double=True),
}

_LEAF = re.compile(r".*/kernel_(q|low|scale\w*)$")


def is_quantized(path: str) -> bool:
  """Returns whether the array at `path` holds codes or scales of a quantized kernel.

  Such arrays keep their dtype when others are cast.
  """
  return _LEAF.match(path) is not None


def leaf_shapes(form: Format, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns {name: shape and dtype} of the arrays that a quantized kernel consists of.

  `shape` is that of the kernel: [I, O], or [L, I, O] for stacked layers.
  """
  quantize = form.quantize if len(shape) == 2 else jax.vmap(form.quantize)
  result: dict[str, jax.ShapeDtypeStruct] = jax.eval_shape(
    quantize, jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  return result
