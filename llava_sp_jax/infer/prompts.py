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
    runs = reading.question(
      request.question,
      len(plans),
      self._template,
      self._tokenizer,
      request.system,
      history=request.history,
    )
    sizes = _sizes(runs, plans)
    length = sum(sizes)
    if not length:
      raise SampleError("the prompt is empty: a question, or a template with text, is needed")
    row = example.layout(runs, plans, length, sum(p.tiles for p in plans))
    tiles = tuple((key, i) for key, p in zip(keys, plans, strict=True) for i in range(p.tiles))
    ends = np.cumsum(sizes)
    replies = [int(end) for run, end in zip(runs, ends, strict=True) if all(run.supervised)]
    each = plans[0].tile_tokens if plans else 0
    return Prompt(self._cut(row.tokens, row.slots, tiles, each, replies))

  def _cut(
    self,
    tokens: Int[np.ndarray, " T"],
    slots: Int[np.ndarray, " T"],
    tiles: tuple[TileKey, ...],
    tile_tokens: int,
    replies: list[int],
  ) -> tuple[PromptPiece, ...]:
    """Cuts a prompt where a piece can be shared.

    Cuts before its first image, after the last image of its first turn, and behind the replies of
    earlier turns, which end at `replies`.
    """
    places = np.flatnonzero(slots >= 0)
    cuts: set[int] = set()
    if self._share:
      cuts |= set(replies)
      begun = places[places < min(replies, default=len(tokens))]
      if len(begun) and begun[-1] + 1 < len(tokens):
        first = int(begun[0])
        cuts |= {*([first] if first >= SHARED else []), int(begun[-1]) + 1}
    borders = [0, *sorted(cuts), len(tokens)]
    pieces, key = [], ""
    for start, end in itertools.pairwise(borders):
      own, shows = _own(slots[start:end], tiles, tile_tokens)
      digest = hashlib.sha256(key.encode() + tokens[start:end].tobytes())
      digest.update(own.tobytes() + repr(shows).encode())
      key = digest.hexdigest()
      pieces.append(PromptPiece(tokens[start:end], own, shows, key, start))
    return tuple(pieces)


def _sizes(runs: list[example.Run], plans: list[example.TokenPlan]) -> list[int]:
  """Returns the positions of each run. An image without a plan has one; `layout` refuses it."""
  images = iter(plans)

  def size(token: int) -> int:
    plan = next(images, None) if token == example.IMAGE_ID else None
    return len(plan.slots) if plan else 1

  return [sum(map(size, run.ids)) for run in runs]


def _own(
  slots: Int[np.ndarray, " t"], tiles: tuple[TileKey, ...], tile_tokens: int
) -> tuple[Int[np.ndarray, " t"], tuple[TileKey, ...]]:
  """Returns the slots of a piece as indices into the tokens of its own tiles, and those tiles.

  So a piece does not change when a later one shows another image. `slots` index the tokens of all
  `tiles`.
  """
  newline = len(tiles) * tile_tokens
  shown = slots[(slots >= 0) & (slots < newline)]
  if not len(shown):
    return slots, ()
  first, last = int(shown.min()) // tile_tokens, int(shown.max()) // tile_tokens
  own = np.where(slots == newline, (last - first + 1) * tile_tokens, slots - first * tile_tokens)
  return np.where(slots >= 0, own, slots).astype(slots.dtype), tiles[first : last + 1]
