"""Computes the cross-entropy through the head, one slice of positions at a time.

The logits of all positions, [B, T, V], never exist at once.

Shape letters:  B rows . T row length . C positions of a slice . D width . V vocabulary
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Float32, Int, Shaped

from llava_sp_jax.distributed import sharding
from llava_sp_jax.models.arrays import Array
from llava_sp_jax.training.state import Flat

Head = Callable[[Flat, Float[Array, "*B D"]], Float32[Array, "*B V"]]  # with its parameters
Kept = tuple[Flat, Float[Array, "B T D"]]  # gradients of the parameters and of `hidden`


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def sums(
  head: Head,
  chunk: int,
  trainable: Flat,
  frozen: Flat,
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  about_image: Float[Array, "B T"],
) -> Float32[Array, " 3"]:
  """Returns the sums of losses, of correct tokens, and of losses in samples with an image.

  Each is weighted by `weights`. The result is differentiable in `trainable` and `hidden`. The
  gradients are computed together with the loss, slice by slice. So logits are computed once, and a
  frozen head has no gradient.

  Args:
    head: maps (parameters of the head by path, hidden states) to logits.
    chunk: positions of a slice.
    trainable: the trainable parameters of the head by path.
    frozen: its other parameters by path.
    hidden: hidden states that the head reads.
    targets: the token ids to predict.
    weights: of each position in the loss; 0 leaves it out.
    about_image: 1 at positions of samples with an image, else 0.
  """
  total, _, _ = _scan(
    head, chunk, trainable, frozen, hidden, targets, weights, about_image, gradients=False
  )
  return total


def _forward(
  head: Head,
  chunk: int,
  trainable: Flat,
  frozen: Flat,
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  about_image: Float[Array, "B T"],
) -> tuple[Float32[Array, " 3"], Kept]:
  total, d_learning, d_hidden = _scan(
    head, chunk, trainable, frozen, hidden, targets, weights, about_image, gradients=True
  )
  return total, (d_learning, d_hidden)


def _backward(
  head: Head, chunk: int, kept: Kept, cotangent: Float32[Array, " 3"]
) -> tuple[Flat, None, Float[Array, "B T D"], None, None, None]:
  """Scales the gradients of `_forward` by the cotangent of the loss."""
  by = cotangent[0]
  d_learning, d_hidden = jax.tree.map(lambda g: (g * by).astype(g.dtype), kept)
  return d_learning, None, d_hidden, None, None, None


sums.defvjp(_forward, _backward)


def _scan(
  head: Head,
  chunk: int,
  trainable: Flat,
  frozen: Flat,
  hidden: Float[Array, "B T D"],
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
  about_image: Float[Array, "B T"],
  *,
  gradients: bool,
) -> tuple[Float32[Array, " 3"], Flat, Float[Array, "*BTD"]]:
  frozen = sharding.gather(frozen)  # once instead of in every slice

  def one(
    trainable: Flat,
    h: Float[Array, "B C D"],
    targets: Int[Array, "B C"],
    weights: Float[Array, "B C"],
    image: Float[Array, "B C"],
  ) -> tuple[Float32[Array, ""], tuple[Float32[Array, ""], Float32[Array, ""]]]:
    logits = head({**trainable, **frozen}, h)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights
    right = (jnp.argmax(logits, axis=-1) == targets) * weights
    return loss.sum(), (right.sum(), (loss * image).sum())

  def slice_sums(
    h: Float[Array, "B C D"], *rest: Shaped[Array, "B C"]
  ) -> tuple[Float32[Array, " 3"], Flat, Float[Array, "*BCD"]]:
    if not gradients:
      loss, others = one(trainable, h, *rest)
      return jnp.stack([loss, *others]), {}, jnp.zeros((), h.dtype)
    run: Any = functools.partial(jax.vjp, has_aux=True)
    loss, pull, others = run(lambda p, h: one(p, h, *rest), trainable, h)
    d_learning, d_hidden = pull(jnp.ones((), loss.dtype))
    return jnp.stack([loss, *others]), d_learning, d_hidden

  length = hidden.shape[1]
  if length <= chunk:
    return slice_sums(hidden, targets, weights, about_image)
  extra = -length % chunk
  padded = [
    jnp.pad(x, ((0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)))
    for x in (hidden, targets, weights, about_image)
  ]

  def body(
    carry: tuple[Float32[Array, " 3"], Flat], start: Int[Array, ""]
  ) -> tuple[tuple[Float32[Array, " 3"], Flat], Float[Array, "*BCD"]]:
    total, d_learning = carry
    part = (jax.lax.dynamic_slice_in_dim(x, start, chunk, axis=1) for x in padded)
    more, more_learning, d_hidden = slice_sums(*part)
    d_learning = sharding.constrain(jax.tree.map(jnp.add, d_learning, more_learning))
    return (total + more, d_learning), d_hidden

  nothing = jax.tree.map(jnp.zeros_like, trainable) if gradients else {}
  starts = jnp.arange(0, length + extra, chunk)
  (total, d_learning), d_hidden = jax.lax.scan(body, (jnp.zeros(3), nothing), starts)
  if gradients:  # [T / C, B, C, D]
    d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(padded[0].shape)[:, :length]
  return total, d_learning, d_hidden
