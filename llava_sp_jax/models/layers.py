"""Holds the layers that tower and decoder share: norms, rotary positions, masks, attention.

Shape letters:  B batch . T queries . S keys . N heads . K key-value heads . H head width . D width
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Float32, Int, Shaped

from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.models.arrays import Array


class RMSNorm(nn.Module):
  """Normalizes by the root mean square in float32, as in LLaMA. [..., D] -> [..., D]."""

  eps: float

  @nn.compact
  def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return x32.astype(x.dtype) * scale.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Rope:
  """Holds the settings of rotary positions: `theta`, and those of `config.RopeScaling`."""

  theta: float
  kind: str = "default"  # a row of ROPES
  factor: float = 1.0
  original_length: int = 0
  low_frequency: float = 1.0
  high_frequency: float = 4.0
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float = 0.0

  def angles(
    self, width: int, positions: Int[Array, "B T"], segments: Int[Array, "B T"]
  ) -> tuple[Float32[Array, "B T {width}//2"], Float32[Array, "B T {width}//2"]]:
    """Returns cosines and sines of the rotation of each position, for heads of width `width`.

    Raises: ValueError when the kind needs `original_length` and it is not set.
    """
    frequency, amplitude = ROPES[self.kind](self, width, positions, segments)
    angle = positions[..., None].astype(np.float32) * frequency  # rounded as in torch
    return jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude

  def trained_length(self) -> int:
    """Returns `original_length`, in positions. Raises: ValueError if it is not set."""
    if self.original_length < 1:
      raise ValueError(
        f"rope kind {self.kind!r} needs original_length >= 1, found {self.original_length}"
      )
    return self.original_length


Positions = Int[Array, "B T"]
# A kind maps (rope, H, positions [B, T], segments [B, T]) to frequencies [H/2] or [B, T, H/2] in
# radians per position, and to an amplitude of cosines and sines. Source: transformers 5,
# `modeling_rope_utils.py`, in float32 as there.
Frequencies = tuple[Float[np.ndarray | Array, "*BT half"], float]


def _default(rope: Rope, width: int, positions: Positions, segments: Positions) -> Frequencies:
  exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  # A power that is correctly rounded to float32 has torch's bits. At position 600, a difference of
  # one bit is 4e-5 of an angle.
  power = (rope.theta ** exponent.astype(np.float64)).astype(np.float32)
  return np.float32(1) / power, 1.0


def _linear(rope: Rope, width: int, positions: Positions, segments: Positions) -> Frequencies:
  frequency, _ = _default(rope, width, positions, segments)
  return frequency / np.float32(rope.factor), 1.0


def _dynamic(rope: Rope, width: int, positions: Positions, segments: Positions) -> Frequencies:
  """Scales by NTK: beyond the trained length, `theta` grows with the length of the sample.

  As in transformers, the length is the last position of this call plus one, so keys in a cache keep
  the frequencies of the call that wrote them. Unlike there, each sample has its own length, so
  neither the rest of its batch nor an earlier, longer prompt changes a result.
  """
  trained = rope.trained_length()
  sample = segments // BRANCHES
  same = sample[:, :, None] == sample[:, None, :]
  length = jnp.max(jnp.where(same, positions[:, None, :], 0), axis=-1) + 1
  length = jnp.maximum(length, trained).astype(jnp.float32)[..., None]
  stretch = rope.factor * length / trained - (rope.factor - 1)
  theta = rope.theta * stretch ** (width / (width - 2))
  return 1 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width)), 1.0


def _llama3(rope: Rope, width: int, positions: Positions, segments: Positions) -> Frequencies:
  """Divides slow frequencies by `factor`, keeps fast ones, and interpolates between them."""
  frequency, _ = _default(rope, width, positions, segments)
  turns = rope.trained_length() * frequency / np.float32(2 * math.pi)
  kept = (turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
  kept = np.clip(kept, 0, 1).astype(np.float32)
  return (1 - kept) * frequency / np.float32(rope.factor) + kept * frequency, 1.0


def _yarn(rope: Rope, width: int, positions: Positions, segments: Positions) -> Frequencies:
  """Interpolates as `_llama3`, with a ramp over the index of the frequency.

  Cosines and sines are scaled, too.
  """
  frequency, _ = _default(rope, width, positions, segments)

  def index(turns: float) -> float:
    """Returns the index of the frequency with `turns` turns within the trained length."""
    ratio = rope.trained_length() / (turns * 2 * math.pi)
    return width * math.log(ratio) / (2 * math.log(rope.theta))

  low = max(math.floor(index(rope.beta_fast)), 0)
  high = min(math.ceil(index(rope.beta_slow)), width - 1)
  ramp = (np.arange(width // 2, dtype=np.float32) - low) / max(high - low, 0.001)
  kept = 1 - np.clip(ramp, 0, 1).astype(np.float32)
  own = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
  stretched = (1 - kept) * frequency / np.float32(rope.factor) + kept * frequency
  return stretched, rope.attention_factor or own


ROPES: dict[str, Callable[[Rope, int, Positions, Positions], Frequencies]] = {
  "default": _default,
  "linear": _linear,
  "dynamic": _dynamic,
  "llama3": _llama3,
  "yarn": _yarn,
}


def rotary(
  x: Float[Array, "B T N H"], cos: Float[Array, "B T H//2"], sin: Float[Array, "B T H//2"]
) -> Float[Array, "B T N H"]:
  """Rotates queries or keys by their positions; pairs are (i, i + H/2), as at Hugging Face."""
  half = x.shape[-1] // 2
  cos, sin = cos[:, :, None], sin[:, :, None]
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def causal_mask(
  query_index: Int[Array, "B T"],
  query_segments: Int[Array, "B T"],
  key_index: Int[Array, "B S"],
  key_segments: Int[Array, "B S"],
) -> Bool[Array, "B T S"]:
  """Returns which keys each query sees: earlier entries of its segment and of its trunk.

  The query itself is one of them, and padding (segment 0) is not. An index counts within the row;
  segments are described at `BRANCHES`.
  """
  query, key = query_segments[:, :, None], key_segments[:, None, :]
  related = (key == query) | (key == query // BRANCHES * BRANCHES)
  return related & (key > 0) & (key_index[:, None, :] <= query_index[:, :, None])


def window_mask(
  query_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"], window: int
) -> Bool[Array, "B T S"]:
  """Returns which keys are among the last `window` positions, the query's own included.

  Positions count within the sample, not within the row. So a packed sample has the same window as
  alone, and a branch continues the count of its trunk, whatever is between them in the row. Other
  samples are not excluded; combine it with `causal_mask`.
  """
  return query_positions[:, :, None] - key_positions[:, None, :] < window


REST = "rest"  # of the axes of "batch", in `constrain`


def constrain(x: Shaped[Array, "*B"], *axes: str | None) -> Shaped[Array, "*B"]:
  """Constrains the sharding of `x`; `axes` names a logical axis for each dimension.

  The current rules map logical axes to mesh axes, of which those are used that `dividing` returns, as
  for parameters. A dimension REST is divided over what the others leave of the axes of
  "batch". Without a mesh or rules, `x` is returned as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  parts = []
  named = tuple(None if axis == REST else axis for axis in axes)
  for names, size in zip(nn.logical_to_mesh_axes(named) or (), x.shape, strict=False):
    parts.append(dividing(names, size, mesh.shape))
  if REST in axes and parts:
    (batch,) = nn.logical_to_mesh_axes(("batch",)) or (None,)
    used = {name for part in parts for name in part or ()}
    left = tuple(n for n in ((batch,) if isinstance(batch, str) else batch or ()) if n not in used)
    parts[axes.index(REST)] = dividing(left, x.shape[axes.index(REST)], mesh.shape)
  result: jax.Array = jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))
  return result


def dividing(
  names: str | Sequence[str] | None, size: int, mesh: Mapping[str, int]
) -> tuple[str, ...] | None:
  """Returns those of some mesh axes, in their order, that divide a dimension into the most parts.

  `names` are the axes, and `mesh` has their sizes. Returns None if none divides it.
  """
  given = (names,) if isinstance(names, str) else tuple(names or ())
  ways = {
    some: math.prod(mesh[name] for name in some)
    for count in range(len(given), 0, -1)
    for some in itertools.combinations(given, count)
  }
  return max((some for some in ways if size % ways[some] == 0), key=ways.__getitem__, default=None)


def attend(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  mask: Bool[Array, "B T S"] | None,
) -> Float[Array, "B T N H"]:
  """Computes attention with XLA. N / K query heads share a key-value head; `mask` None sees all."""
  return jax.nn.dot_product_attention(
    q, k, v, mask=None if mask is None else mask[:, None], implementation="xla"
  )
