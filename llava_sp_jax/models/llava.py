"""Combines a vision tower, a projector and a decoder; an index array places the image tokens.

Shape letters:  B rows . M images per row . N tokens per image . T positions . D model width
                H,W pixels
"""

from __future__ import annotations

import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llava_sp_jax.models.cache import KVCache, New
from llava_sp_jax.models.llama import Decoder
from llava_sp_jax.models.projector import Projector
from llava_sp_jax.models.vit import VisionTransformer


def merge(text: jax.Array, image: jax.Array, slots: jax.Array) -> jax.Array:
  """Puts image tokens where `slots` is not -1. [B, T, D], [B, MN, D], [B, T] -> [B, T, D]."""
  picked = jnp.take_along_axis(image, jnp.maximum(slots, 0)[..., None], axis=1)
  return jnp.where(slots[..., None] >= 0, picked.astype(text.dtype), text)


class LlavaSP(nn.Module):
  """Holds the whole model; training calls it, inference calls its parts, both by `apply`."""

  vision_tower: VisionTransformer
  projector: Projector
  language_model: Decoder
  precision: str = ""  # jax's precision of matrix products and convolutions; "": the platform's

  @nn.nowrap
  def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls linen's `apply` with `precision` as the precision of all matrix products.

    A product keeps the precision that it was traced with, so gradients, scans and recomputation
    have it, too. Only a function that is traced for a gradient alone does not (see splash in
    `attention`).
    """
    asked = jax.default_matmul_precision(self.precision) if self.precision else None
    with asked or contextlib.nullcontext():
      return super().apply(variables, *args, **kwargs)

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    images: jax.Array,
    slots: jax.Array,
  ) -> jax.Array:
    """Returns hidden states for `logits`. [B,T] x3, [B,M,H,W,3], [B,T] -> [B,T,D]."""
    hidden, _ = self.extend(tokens, positions, segments, self.encode_image(images), slots, None)
    return hidden

  def encode_image(self, images: jax.Array) -> jax.Array:
    """Returns the tokens of a row's images, one after another. [B, M, H, W, 3] -> [B, M*N, D].

    With `projector.newline` there is one more, at index M*N: the token that ends a row of tile
    patches.
    """
    tokens = self.encode_tiles(images.reshape(-1, *images.shape[2:]))
    return self.join_tiles(tokens.reshape(*images.shape[:2], *tokens.shape[1:]))

  def encode_tiles(self, images: jax.Array) -> jax.Array:  # [B, H, W, 3] -> [B, N, D]
    return self.projector(self.vision_tower(images))

  def join_tiles(self, tokens: jax.Array) -> jax.Array:
    """Returns what the slots of a row index: the tokens of its tiles, then the newline.

    [B, M, N, D] -> [B, M*N (+1), D].
    """
    tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    if not self.projector.newline:
      return tokens
    newline = self.projector.image_newline.astype(tokens.dtype)
    newline = jnp.broadcast_to(newline, (len(tokens), 1, tokens.shape[-1]))
    return jnp.concatenate([tokens, newline], axis=1)

  def extend(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    segments: jax.Array,
    image: jax.Array | None,
    slots: jax.Array | None,
    cache: KVCache | None,
  ) -> tuple[jax.Array, New | None]:
    """Runs the decoder over new positions, which also see the cache, as `Decoder.__call__`.

    `image` comes from `encode_image` or `join_tiles`.
    """
    embeds = self.language_model.embed(tokens)
    if image is not None and slots is not None and image.shape[1]:
      embeds = merge(embeds, image, slots)
    return self.language_model(embeds, positions, segments, cache)

  def logits(self, hidden: jax.Array) -> jax.Array:  # [..., D] -> [..., V] float32
    return self.language_model.logits(hidden)
