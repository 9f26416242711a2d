"""Compares a kernel of attention with plain attention on a device of the run, before it trains.

A kernel that is right where it was made may be wrong on another chip or with another compiler, and a
run would learn from it in silence. A few heads of one packed row take seconds.

Shape letters:  T tokens . N heads . K key-value heads . H head width
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.data import packing
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.models import attention, build, layers
from llava_sp_jax.models.attention import AttentionChoice, Case

COMPARED = ("flash", "cudnn_packed")  # rows of `attention.IMPLEMENTATIONS`
HEADS = 4  # that are compared, at most
SAMPLES = (0.2, 0.3, 0.4)  # of the row, which a row of several samples has; the rest is padding
# How far the result at any position may be from float32, as a share of its norm: products and
# results are rounded to bfloat16 (eight bits) a few times. A wrong tile is ten times as far.
TOLERANCE = 0.03
THETA = 10000.0  # of the rotation, which a kernel may compute itself
RESULTS = ("output", "gradient of queries", "gradient of keys", "gradient of values")


def problems(config: config_lib.Config, _: Tokenizer) -> list[str]:
  """Returns a problem if the kernel that a run will use is wrong on the first device here.

  Compares its output and gradients with plain attention in float32; [] if no kernel of COMPARED is
  used.
  """
  device = jax.local_devices()[0]
  branches, samples = config.data.turns == "branch", packing.most_samples(config.data)
  module = build.compiled_for(build.model(config.model), device.platform, branches, samples)
  text = config.model.language_model
  shared = text.heads // text.kv_heads
  keys = max(1, HEADS // shared)
  case = Case(
    module.language_model.attention,
    config.data.row_length,
    text.head_dim,
    jnp.dtype(config.model.dtype),
    cached=False,
    split=(1, keys * shared, keys),
  )
  name = attention.choose(case)
  if name not in COMPARED:
    return []
  with jax.default_device(device):
    found, wanted = (_results(case, row) for row in (name, "xla"))
  distances = [_distance(a, b) for a, b in zip(found, wanted, strict=True)]
  far = [
    f"{result} by {distance:.3g}"
    for result, distance in zip(RESULTS, distances, strict=True)
    if not distance <= TOLERANCE
  ]
  if not far:
    return []
  others = [row for row in attention.PLATFORMS.get(device.platform, ()) if row != name]
  return [
    f"model.attention: {name} computes other values on {device.device_kind} (jax {jax.__version__}) "
    f"than plain attention: {', '.join(far)} of the norm; expected at most {TOLERANCE}; train with "
    f"--config.model.attention={(others or ['xla'])[0]}"
  ]


def _results(case: Case, name: str) -> list[np.ndarray]:
  """Computes attention and its gradients for a packed row; "xla" computes them in float32."""
  dtype = jnp.float32 if name == "xla" else case.dtype
  length, (_, heads, keys) = case.length, case.split
  spec: AttentionChoice = dataclasses.replace(case.spec, name=name, precision="")
  segments = jnp.asarray(_segments(length, case.spec.samples))
  index = jnp.arange(length)[None]
  mask = layers.causal_mask(index, segments, index, segments)
  if spec.window:
    mask &= layers.window_mask(index, index, spec.window)
  mask |= jnp.eye(length, dtype=bool) & (segments == 0)[:, :, None]
  angles = layers.Rope(THETA).angles(case.head_dim, index, segments)
  drawn = jax.random.split(jax.random.key(0), 4)
  q, k, v, given = (
    jax.random.normal(key, (1, length, n, case.head_dim), jnp.bfloat16).astype(dtype)
    for key, n in zip(drawn, (heads, keys, keys, heads), strict=True)
  )
  given = given * (segments > 0)[..., None, None].astype(dtype)
  run = functools.partial(attention.attend, spec)

  @jax.jit
  def program(q: Any, k: Any, v: Any, given: Any) -> Any:
    out, back = jax.vjp(lambda q, k, v: run(q, k, v, mask, segments, angles), q, k, v)
    return jnp.where((segments > 0)[..., None, None], out, 0), *back(given)

  with jax.default_matmul_precision("highest" if name == "xla" else "default"):
    return [np.asarray(x.astype(jnp.float32)) for x in program(q, k, v, given)]


def _segments(length: int, most: int) -> np.ndarray:
  """Returns the segments of a row of several samples, or of one, and padding. [1, T] int32."""
  ends = np.cumsum(SAMPLES) if most != 1 else np.asarray([sum(SAMPLES)])
  result = np.zeros((1, length), np.int32)
  for number, end in reversed(list(enumerate(ends, 1))):
    result[0, : math.ceil(end * length)] = number * BRANCHES
  return result


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
  """Returns the largest distance of a position [T, N, H], as a share of its norm or the mean norm."""
  far = np.sqrt(np.square(found - wanted).sum(axis=(2, 3)))
  norms = np.sqrt(np.square(wanted).sum(axis=(2, 3)))
  return float((far / np.maximum(norms, np.sqrt(np.square(norms).mean()))).max())
