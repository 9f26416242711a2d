"""Computes the metrics of a step on the device: sums over the batch, and gradient norms.

Everything that depends on the batch is a sum, so that micro-batches can be added up.

Shape letters:  B rows . T row length . P trainable parameters
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llava_sp_jax.batch import BRANCHES

Sums = dict[str, jax.Array]

# (part, regex over parameter paths); the first match wins and nothing may stay unmatched.
PARTS: tuple[tuple[str, str], ...] = (
  ("lora", r"language_model/.*/lora_[ab]$"),
  ("projector", r"projector/(fc[12]/|image_newline$)"),
  ("spatial", r"projector/"),  # views, details and their output layer
  ("vision_tower", r"vision_tower/"),
  ("language_model", r"language_model/"),
)


def part_of(path: str) -> str:
  """Returns the part (a name in PARTS, such as "lora" or "spatial") of the parameter at `path`.

  Raises: KeyError when no row of PARTS matches.
  """
  for part, pattern in PARTS:
    if re.match(pattern, path):
      return part
  raise KeyError(f"no row of PARTS matches parameter {path!r}")


def about_image(batch: Mapping[str, jax.Array]) -> jax.Array:
  """Returns 1 at the positions of samples with an image, 0 at all others. [B, T] float32.

  The positions of a sample are contiguous, so running counts at its first and last position
  suffice.
  """
  sample, image = batch["segments"] // BRANCHES, (batch["slots"] >= 0).astype(jnp.int32)
  seen = jnp.cumsum(image, axis=1)
  change = sample[:, 1:] != sample[:, :-1]
  edge = jnp.ones_like(image[:, :1], dtype=bool)
  first = jnp.concatenate([edge, change], axis=1)
  last = jnp.concatenate([change, edge], axis=1)
  before = jax.lax.cummax(jnp.where(first, seen - image, 0), axis=1)
  most = np.iinfo(np.int32).max
  after = jax.lax.cummin(jnp.where(last, seen, most), axis=1, reverse=True)
  return (after > before).astype(jnp.float32)


def batch_sums(batch: Mapping[str, jax.Array], image: jax.Array) -> Sums:
  """Returns the counts of a batch as float32 scalars; `image` is the result of `about_image`.

  They are count and image_count (supervised tokens, and those in samples with an image), positions
  (that hold a token), image_positions (that hold an image token) and pairs. `pairs` counts the
  (query, key) pairs of attention: a token at position p of its sample attends to p + 1 keys.
  """
  used = (batch["segments"] > 0).astype(jnp.float32)
  return {
    "count": batch["weights"].sum(),
    "image_count": (batch["weights"] * image).sum(),
    "positions": used.sum(),
    "pairs": (used * (batch["positions"] + 1.0)).sum(),
    "image_positions": (batch["slots"] >= 0).astype(jnp.float32).sum(),
  }


def report(sums: Sums, grads: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Computes the metrics of a step from its sums and its gradients before clipping.

  All are float32 scalars except `grad_squares` [P], the sum of squares of each gradient, in the
  order of sorted paths. `loss_text` and `loss_image` are means over the tokens of samples without
  and with an image; a mean without tokens is 0.
  """
  squares = jnp.stack([jnp.sum(jnp.square(grads[p].astype(jnp.float32))) for p in sorted(grads)])
  squares = nn.with_logical_constraint(squares, (None,))  # whole on every process, to be read
  count, image_count = sums["count"], sums["image_count"]
  text_count = count - image_count
  return {
    "loss": sums["loss"] / jnp.maximum(count, 1),
    "loss_image": sums["image_loss"] / jnp.maximum(image_count, 1),
    "loss_text": (sums["loss"] - sums["image_loss"])
    / jnp.maximum(text_count, 1)
    * (text_count > 0),
    "token_accuracy": sums["right"] / jnp.maximum(count, 1),
    "grad_norm": jnp.sqrt(squares.sum()),
    "grad_squares": squares,
    "tokens": count,
    "image_tokens": image_count,
    "positions": sums["positions"],
    "pairs": sums["pairs"],
    "image_positions": sums["image_positions"],
  }


def norms(squares: Any, paths: Iterable[str]) -> dict[str, float]:
  """Returns {part: norm of its gradient}, computed on the host from `grad_squares` of a step.

  `squares` are the sums of squares of the parameters at `paths`, in the order of sorted paths.
  """
  totals: dict[str, float] = {}
  for path, square in zip(sorted(paths), np.asarray(squares, np.float64), strict=True):
    totals[part_of(path)] = totals.get(part_of(path), 0.0) + float(square)
  return {part: total**0.5 for part, total in totals.items()}
