"""Layers that tower and decoder share: norms, rotary positions, masks, attention.

Shape letters:  B batch . T queries . S keys . N heads . K key-value heads . H head width . D width
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

# Segment ids say who may see whom. 0 is padding. A sample owns the ids n*BRANCHES .. +BRANCHES-1:
# the first is its trunk, which all its branches see; branches do not see each other.
BRANCHES = 1 << 12


class RMSNorm(nn.Module):
  """Root-mean-square norm in float32. [..., D] -> [..., D]. (LLaMA)."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
    return x32.astype(x.dtype) * scale.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions: `theta`, and how they are stretched, in the words of `config.RopeScaling`."""

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
    self, width: int, positions: jax.Array, segments: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for heads of `width` H. [B, T] x2 -> [B, T, H/2] x2, float32.

    Raises: ValueError when the kind needs `original_length`.
    """
    frequency, amplitude = ROPES[self.kind](self, width, positions, segments)
    angle = positions[..., None].astype(np.float32) * frequency  # rounded as torch does
    return jnp.cos(angle) * amplitude, jnp.sin(angle) * amplitude

  def trained_length(self) -> int:
    if self.original_length < 1:
      raise ValueError(
        f"rope kind {self.kind!r} needs original_length >= 1, found {self.original_length}"
      )
    return self.original_length


# A kind gives frequencies [H/2] (or [B, T, H/2]) in radians per position, and an amplitude for
# cosines and sines: (rope, H, positions [B, T], segments [B, T]). Source: transformers 5,
# `modeling_rope_utils.py`, in float32 as there.
Frequencies = tuple[np.ndarray | jax.Array, float]


def _default(rope: Rope, width: int, positions: jax.Array, segments: jax.Array) -> Frequencies:
  exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
  # A power correctly rounded to float32 gives torch's bits; at position 600 one bit more or less
  # is 4e-5 of an angle.
  power = (rope.theta ** exponent.astype(np.float64)).astype(np.float32)
  return np.float32(1) / power, 1.0


def _linear(rope: Rope, width: int, positions: jax.Array, segments: jax.Array) -> Frequencies:
  frequency, _ = _default(rope, width, positions, segments)
  return frequency / np.float32(rope.factor), 1.0


def _dynamic(rope: Rope, width: int, positions: jax.Array, segments: jax.Array) -> Frequencies:
  """NTK: beyond the trained length, `theta` grows with the sample's length.

  As in transformers, the length is the last position of this call plus one, so keys that are in a
  cache keep the frequencies of the call that wrote them. Unlike there, each sample has its own
  length: neither the rest of its batch nor an earlier, longer prompt changes a result.
  """
  trained = rope.trained_length()
  sample = segments // BRANCHES
  same = sample[:, :, None] == sample[:, None, :]
  length = jnp.max(jnp.where(same, positions[:, None, :], 0), axis=-1) + 1
  length = jnp.maximum(length, trained).astype(jnp.float32)[..., None]
  stretch = rope.factor * length / trained - (rope.factor - 1)
  theta = rope.theta * stretch ** (width / (width - 2))
  return 1 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width)), 1.0


def _llama3(rope: Rope, width: int, positions: jax.Array, segments: jax.Array) -> Frequencies:
  """Slow frequencies are divided by `factor`, fast ones kept, those between interpolated."""
  frequency, _ = _default(rope, width, positions, segments)
  turns = rope.trained_length() * frequency / np.float32(2 * math.pi)
  kept = (turns - rope.low_frequency) / (rope.high_frequency - rope.low_frequency)
  kept = np.clip(kept, 0, 1).astype(np.float32)
  return (1 - kept) * frequency / np.float32(rope.factor) + kept * frequency, 1.0


def _yarn(rope: Rope, width: int, positions: jax.Array, segments: jax.Array) -> Frequencies:
  """As `_llama3` with a ramp over the index of the frequency; cosines and sines grow, too."""
  frequency, _ = _default(rope, width, positions, segments)

  def index(turns: float) -> float:
    """Of the frequency that makes so many turns within the trained length."""
    ratio = rope.trained_length() / (turns * 2 * math.pi)
    return width * math.log(ratio) / (2 * math.log(rope.theta))

  low = max(math.floor(index(rope.beta_fast)), 0)
  high = min(math.ceil(index(rope.beta_slow)), width - 1)
  ramp = (np.arange(width // 2, dtype=np.float32) - low) / max(high - low, 0.001)
  kept = 1 - np.clip(ramp, 0, 1).astype(np.float32)
  own = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
  stretched = (1 - kept) * frequency / np.float32(rope.factor) + kept * frequency
  return stretched, rope.attention_factor or own


ROPES: dict[str, Callable[[Rope, int, jax.Array, jax.Array], Frequencies]] = {
  "default": _default,
  "linear": _linear,
  "dynamic": _dynamic,
  "llama3": _llama3,
  "yarn": _yarn,
}


def rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotary embedding, half-split as in Hugging Face. [B,T,N,H], [B,T,H/2] x2 -> [B,T,N,H]."""
  half = x.shape[-1] // 2
  cos, sin = cos[:, :, None], sin[:, :, None]
  a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def causal_mask(
  query_index: jax.Array, query_segments: jax.Array, key_index: jax.Array, key_segments: jax.Array
) -> jax.Array:
  """Who sees whom: earlier entries of the same segment and of its trunk.

  Args: query_index, query_segments [B, T]; key_index, key_segments [B, S] (index within the row,
  segments as described at `BRANCHES`). Returns: [B, T, S] bool.
  """
  query, key = query_segments[:, :, None], key_segments[:, None, :]
  related = (key == query) | (key == query // BRANCHES * BRANCHES)
  return related & (key > 0) & (key_index[:, None, :] <= query_index[:, :, None])


def window_mask(query_positions: jax.Array, key_positions: jax.Array, window: int) -> jax.Array:
  """Which keys are among the last `window` positions, the query's own included. -> [B, T, S] bool.

  Positions are those within the sample, not the row's index: a packed sample has the window that it
  has alone, and a branch counts on from its trunk, whatever stands between them in the row. It says
  nothing about other samples; combine it with `causal_mask`. Args: positions [B, T] and [B, S].
  """
  return query_positions[:, :, None] - key_positions[:, None, :] < window


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Holds `x` where the rules in force put its logical axes, one for each dimension.

  Mesh axes that do not divide a dimension are left out, as they are for parameters; without a mesh
  or rules nothing happens.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  parts = []
  for names, size in zip(nn.logical_to_mesh_axes(axes) or (), x.shape, strict=False):
    kept = []
    for name in (names,) if isinstance(names, str) else names or ():
      if size % mesh.shape[name] == 0:
        kept.append(name)
        size //= mesh.shape[name]
    parts.append(tuple(kept) or None)
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
  """Attention with grouped heads. [B, T, N, H], [B, S, K, H] x2, [B, T, S] -> [B, T, N, H]."""
  return jax.nn.dot_product_attention(
    q, k, v, mask=None if mask is None else mask[:, None], implementation="xla"
  )
