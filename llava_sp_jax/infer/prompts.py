"""Turns requests into prompts on the host: text to ids, images to tiles, and pieces to share.

Shape letters:  t positions of a piece
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
from jaxtyping import Int

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import conversation, example, reading
from llava_sp_jax.data.failure import SampleError, of_one_sample
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.infer.caches import PictureCache
from llava_sp_jax.infer.requests import Prompt, PromptPiece, Request, TileKey, keys_of

SHARED = 16  # positions of text before the first image that make it a piece of its own


class Prompts:
  """Makes prompts as the config of a model says; any thread may call it."""

  def __init__(
    self,
    config: config_lib.Config,
    tokenizer: Tokenizer,
    pictures: PictureCache,
    share: bool = True,
  ):
    """Prepares the conversation template of `config`.

    Args:
      config: names the template, and says how images are cut into tiles.
      tokenizer: turns text into ids.
      pictures: reads each image once, and keeps its pixels until the engine takes them.
      share: whether to cut prompts into pieces that several prompts can share; False makes one
        piece.
    """
    self._template = conversation.TEMPLATES[config.data.template]
    self._tokenizer, self._share = tokenizer, share
    self.pictures = pictures
    self.stop_ids = tokenizer.stop_ids(self._template.end)

  def __call__(self, request: Request) -> Prompt:
    """Makes the prompt of a request: token ids, slots of image tokens, and the images' tiles.

    Raises: SampleError for an image that cannot be read, or a text that the tokenizer refuses.
    """
    with of_one_sample():
      return self._prompt(request)

  def _prompt(self, request: Request) -> Prompt:
    keys = keys_of(request)
    plans = [self.pictures.plan(k, p) for k, p in zip(keys, request.images, strict=True)]
    row = self._row(request, plans)
    tiles = tuple((key, i) for key, p in zip(keys, plans, strict=True) for i in range(p.tiles))
    return Prompt(self._cut(row.tokens, row.slots, tiles))

  def _row(self, request: Request, plans: list[example.TokenPlan]) -> example.TokenRow:
    runs = reading.question(
      request.question, len(plans), self._template, self._tokenizer, request.system
    )
    length = sum(len(run.ids) for run in runs) + sum(len(p.slots) - 1 for p in plans)
    if not length:
      raise SampleError("the prompt is empty: a question, or a template with text, is needed")
    return example.layout(runs, plans, length, sum(p.tiles for p in plans))

  def _cut(
    self, tokens: Int[np.ndarray, " T"], slots: Int[np.ndarray, " T"], tiles: tuple[TileKey, ...]
  ) -> tuple[PromptPiece, ...]:
    """Cuts a prompt before its first image and after its last, where a piece can be shared."""
    places = np.flatnonzero(slots >= 0)
    borders = [0, len(tokens)]
    if self._share and len(places) and places[-1] + 1 < len(tokens):
      first = int(places[0])
      borders = [0, *([first] if first >= SHARED else []), int(places[-1]) + 1, len(tokens)]
    pieces, key = [], ""
    for start, end in itertools.pairwise(borders):
      shows = tiles if (slots[start:end] >= 0).any() else ()
      digest = hashlib.sha256(key.encode() + tokens[start:end].tobytes())
      digest.update(slots[start:end].tobytes() + repr(shows).encode())
      key = digest.hexdigest()
      pieces.append(PromptPiece(tokens[start:end], slots[start:end], shows, key, start))
    return tuple(pieces)
