"""Combines a vision tower, a projector and a decoder; an index array places the image tokens.

Shape letters:  B rows . M tiles per row . N tokens per tile . T positions . D model width
                H,W pixels
"""

from __future__ import annotations

import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from llava_sp_jax.models.arrays import Array
from llava_sp_jax.models.cache import KVCache, New
from llava_sp_jax.models.llama import Decoder
from llava_sp_jax.models.projector import Projector
from llava_sp_jax.models.vit import VisionTransformer


def merge(
  text: Float[Array, "B T D"], image: Float[Array, "B MN D"], slots: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
  """Replaces the embedding where a slot is not -1 by the image token of that index."""
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
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    images: Float[Array, "B M H W 3"],
    slots: Int[Array, "B T"],
  ) -> Float[Array, "B T D"]:
    """Returns the hidden states after the final norm, which `logits` reads.

    Args:
      tokens: token ids.
      positions: of each token in its sample, from 0.
      segments: which positions see each other (`layers.BRANCHES`); 0 is padding.
      images: the M tiles of each row; pixels normalized as the vision tower expects them.
      slots: index of an image token among the row's M * N; -1 for text.
    """
    hidden, _ = self.extend(tokens, positions, segments, self.encode_image(images), slots, None)
    return hidden

  def encode_image(self, images: Float[Array, "B M H W 3"]) -> Float[Array, "B MN D"]:
    """Returns the tokens of a row's images, one after another: M*N in all.

    With `projector.newline` there is one more, at index M*N: the token that ends a row of tile
    patches.
    """
    tokens = self.encode_tiles(images.reshape(-1, *images.shape[2:]))
    return self.join_tiles(tokens.reshape(*images.shape[:2], *tokens.shape[1:]))

  def encode_tiles(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B N D"]:
    """Returns the N image tokens of each tile: spatial tokens, then one for each patch."""
    return self.projector(self.vision_tower(images))

  def join_tiles(self, tokens: Float[Array, "B M N D"]) -> Float[Array, "B MN D"]:
    """Returns what the slots of a row index: the tokens of its tiles, then the newline.

    These are M*N tokens, or M*N + 1 with `projector.newline`.
    """
    tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    if not self.projector.newline:
      return tokens
    newline = self.projector.image_newline.astype(tokens.dtype)
    newline = jnp.broadcast_to(newline, (len(tokens), 1, tokens.shape[-1]))
    return jnp.concatenate([tokens, newline], axis=1)

  def extend(
    self,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"],
    image: Float[Array, "B MN W"] | None,
    slots: Int[Array, "B T"] | None,
    cache: KVCache | None,
  ) -> tuple[Float[Array, "B T D"], New | None]:
    """Runs the decoder over new positions, which also see those in the cache.

    Args:
      tokens, positions, segments: as in `__call__`; with a cache, positions continue from its
        length.
      image: the image tokens, from `encode_image` or `join_tiles`; None for text alone.
      slots: index of an image token for each position; -1 for text.
      cache: keys and values of earlier positions, or None.

    Returns: hidden states, and the new keys and values, None without a cache.
    """
    embeds = self.language_model.embed(tokens)
    if image is not None and slots is not None and image.shape[1]:
      embeds = merge(embeds, image, slots)
    return self.language_model(embeds, positions, segments, cache)

  def logits(self, hidden: Float[Array, "*B D"]) -> Float32[Array, "*B V"]:
    """Returns the float32 logits of hidden states that `__call__` or `extend` returned."""
    return self.language_model.logits(hidden)
