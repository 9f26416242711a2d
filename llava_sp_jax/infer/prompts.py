"""Turns requests into prompts on the host: text to ids, images to tiles, and pieces to share.

Shape letters:  t positions of a piece
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
import threading
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import anyres, conversation, decode, example, reading
from llava_sp_jax.data.failure import SampleError, attempt, of_one_sample
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.models import build

ImageFile = str | Path | bytes | Image.Image | SampleError  # an error: why there is no image
SHARED = 16  # positions of text before the first image that make it a piece of its own


@dataclasses.dataclass(frozen=True)
class Request:
  """Holds one question.

  `images` are files, encoded files as bytes, or decoded pictures. Each `<image>` in the question
  stands for one of them; without any, all come before the question. `system` replaces the system
  text of the template. `number` seeds the sampling (from 0; None is the place among the requests),
  so that a question with a number gets the same answer whatever else is asked.
  """

  question: str
  images: tuple[ImageFile, ...] = ()
  system: str | None = None
  number: int | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
  """Holds one answer; `error` says why there is none, and then the text is empty.

  `ids` are the chosen tokens without the one that ends a reply; with a stop string, up to the token
  that completed it. `margin` is the smallest lead, in logits, of a chosen token over the next best
  one. If it is below rounding errors (float32: about 1e-4), another machine may answer differently.
  """

  text: str
  ids: tuple[int, ...]
  error: str = ""
  margin: float = float("inf")


TileKey = tuple[str, int]  # (key of the picture, index of the tile)


@dataclasses.dataclass(frozen=True)
class PromptPiece:
  """Holds consecutive positions of a prompt.

  `slots` index the tokens of `tiles`, one tile after another. The slot `len(tiles) * N` is the
  newline token. `key` identifies the piece together with all pieces before it.
  """

  tokens: Int[np.ndarray, " t"]  # int32
  slots: Int[np.ndarray, " t"]  # int32
  tiles: tuple[TileKey, ...]
  key: str
  start: int  # positions before the piece


@dataclasses.dataclass(frozen=True)
class Prompt:
  """Holds the pieces of a prompt; all but the last can be shared, and the last is not empty."""

  pieces: tuple[PromptPiece, ...]

  @property
  def length(self) -> int:
    """Returns the number of positions."""
    return self.pieces[-1].start + len(self.pieces[-1].tokens)


def key_of(picture: ImageFile) -> str:
  """Returns a key that is the same for the same path, or for the same bytes or pixels.

  Raises: SampleError for anything that is not an image.
  """
  if isinstance(picture, str | Path):
    return f"file {picture}"
  if isinstance(picture, Image.Image):
    digest = hashlib.sha256(f"{picture.mode} {picture.size}".encode() + picture.tobytes())
    return f"pixels {digest.hexdigest()}"
  if isinstance(picture, SampleError):
    raise picture
  if not isinstance(picture, bytes):
    kind = type(picture).__name__
    raise SampleError(f"an image must be a path, the bytes of a file or a PIL image, found {kind}")
  return f"bytes {hashlib.sha256(picture).hexdigest()}"


def tiles_of(picture: ImageFile, reader: anyres.Reader) -> anyres.Picture:
  """Returns the tiles that `reader` makes of a picture. Raises: SampleError if it is unreadable."""
  if isinstance(picture, SampleError):
    raise picture
  if isinstance(picture, Image.Image):
    return reader(picture)
  if isinstance(picture, bytes):
    opened = decode.picture(io.BytesIO(picture), f"of {len(picture)} bytes")
  else:
    opened = decode.picture(picture)
  with opened as pixels:
    return reader(pixels)


def keys_of(request: Request) -> tuple[str, ...]:
  """Returns the keys of a request's images. Raises: SampleError as `key_of`."""
  return tuple(map(key_of, request.images))


class LostImageError(SampleError):
  """Raised for a picture that was readable when its prompt was made, but no longer is.

  `key` identifies the picture.
  """

  def __init__(self, key: str, why: object):
    super().__init__(why)
    self.key = key


class Pictures:
  """Reads each picture once, whatever the number of threads, and keeps its pixels until taken."""

  def __init__(self, reader: anyres.Reader):
    self._reader = reader
    self._lock = threading.Lock()
    self._plans: dict[str, concurrent.futures.Future[example.TokenPlan]] = {}
    self._tiles: dict[str, np.ndarray] = {}

  def forget(self) -> None:
    """Drops all plans and pixels."""
    with self._lock:
      self._plans.clear()
      self._tiles.clear()

  def plan(self, key: str, picture: ImageFile) -> example.TokenPlan:
    """Returns the token plan of a picture, which is read on the first call for its key.

    Raises: SampleError when the picture cannot be used.
    """
    with self._lock:
      future = self._plans.get(key)
      mine = future is None
      if future is None:
        future = self._plans[key] = concurrent.futures.Future()
    if mine:
      try:
        found = self._read(picture)
        self._tiles[key] = found.tiles
        future.set_result(found.plan)
      except Exception as error:
        future.set_exception(error)
    return future.result()

  def tiles(self, key: str, picture: ImageFile) -> Float[np.ndarray, "M size size 3"]:
    """Takes the pixels of the M tiles of a picture, float32.

    They are read again if they were taken before.

    Raises: LostImageError when the file has disappeared, or its picture has another size now.
    """
    tiles = self._tiles.pop(key, None)
    if tiles is not None:
      return tiles
    again = attempt(lambda: self._read(picture))
    if isinstance(again, SampleError):
      raise LostImageError(key, again)
    if not np.array_equal(again.plan.slots, self.plan(key, picture).slots):
      raise LostImageError(key, f"{key}: is not the picture that it was when it was first read")
    return again.tiles

  def _read(self, picture: ImageFile) -> anyres.Picture:
    return tiles_of(picture, self._reader)


class Prompts:
  """Makes prompts as the config of a model says; any thread may call it."""

  def __init__(self, config: config_lib.Config, tokenizer: Tokenizer, share: bool = True):
    """Prepares the template and the reader of images; `share` False makes prompts of one piece."""
    self._template = conversation.TEMPLATES[config.data.template]
    self._tokenizer, self._share = tokenizer, share
    self.pictures = Pictures(
      anyres.Reader(config.data, anyres.Tile(*build.tile_shape(config.model)))
    )
    self.stop_ids = tokenizer.stop_ids(self._template.end)

  def __call__(self, request: Request) -> Prompt:
    """Returns the prompt of a request.

    Raises: SampleError for any failure: an image, or a text that the tokenizer refuses.
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
