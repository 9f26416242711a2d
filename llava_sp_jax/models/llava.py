"""LlavaSP: a vision tower, a projector and a decoder; image tokens are placed by an index array.

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
  """Image tokens where `slots` points, text where it is -1. [B,T,D], [B,MN,D], [B,T] -> [B,T,D]."""
  picked = jnp.take_along_axis(image, jnp.maximum(slots, 0)[..., None], axis=1)
  return jnp.where(slots[..., None] >= 0, picked.astype(text.dtype), text)


class LlavaSP(nn.Module):
  """The whole model. Training calls it; inference calls its parts, both through `apply`."""

  vision_tower: VisionTransformer
  projector: Projector
  language_model: Decoder
  precision: str = ""  # of every matrix product and convolution, in jax's words; "": the platform's

  @nn.nowrap
  def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
    """Does what linen's does, at `precision`, whatever method is called from whatever program.

    A product keeps the precision that it was traced with: gradients, scans and recomputation have
    it as well. What is traced only for a gradient has not (see `attention`, splash).
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
    """[B,T] x3, [B,M,H,W,3], [B,T] -> hidden states [B, T, D] for `logits`."""
    hidden, _ = self.extend(tokens, positions, segments, self.encode_image(images), slots, None)
    return hidden

  def encode_image(self, images: jax.Array) -> jax.Array:
    """Tokens of a row's images, one after the other. [B, M, H, W, 3] -> [B, M*N, D].

    With `projector.newline` there is one more, M*N: the token that ends a row of tile patches.
    """
    tokens = self.encode_tiles(images.reshape(-1, *images.shape[2:]))
    return self.join_tiles(tokens.reshape(*images.shape[:2], *tokens.shape[1:]))

  def encode_tiles(self, images: jax.Array) -> jax.Array:  # [B, H, W, 3] -> [B, N, D]
    return self.projector(self.vision_tower(images))

  def join_tiles(self, tokens: jax.Array) -> jax.Array:
    """What the slots of a row index: tokens of its tiles, and the newline. -> [B, M*N (+1), D]."""
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
    """Runs the decoder over new positions, which see the cache: `Decoder.__call__`.

    `image` is from `encode_image` or `join_tiles`.
    """
    embeds = self.language_model.embed(tokens)
    if image is not None and slots is not None and image.shape[1]:
      embeds = merge(embeds, image, slots)
    return self.language_model(embeds, positions, segments, cache)

  def logits(self, hidden: jax.Array) -> jax.Array:  # [..., D] -> [..., V] float32
    return self.language_model.logits(hidden)
