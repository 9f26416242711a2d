"""Defines requests, answers, and the pieces that a prompt is cut into.

Shape letters:  t positions of a piece
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int
from PIL import Image

from llava_sp_jax.data import anyres, decode
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.infer.generation import Generation

Reason = Literal["stop", "length"]
ImageFile = str | Path | bytes | Image.Image | SampleError  # an error: why there is no image


@dataclasses.dataclass(frozen=True)
class Request:
  """Holds one question.

  `images` are files, encoded files as bytes, or decoded pictures. Each `<image>` in the question
  stands for one of them; without any, all come before the question. `system` replaces the system
  text of the template. `number` seeds the sampling (from 0; None is the place among the requests),
  so that a question with a number gets the same answer whatever else is asked. `history` are the
  earlier turns of a conversation, (question, answer); the images are those of all turns, in their
  order. `generation` has the settings of this answer; None: those of the engine.
  """

  question: str
  images: tuple[ImageFile, ...] = ()
  system: str | None = None
  number: int | None = None
  history: tuple[tuple[str, str], ...] = ()
  generation: Generation | None = None


@dataclasses.dataclass(frozen=True)
class TokenLogProbability:
  """Holds the log-probability of a chosen token (natural logarithm), before any setting.

  `top` are the likeliest tokens at its place, best first: (id, text, log-probability).
  """

  id: int
  text: str
  value: float
  top: tuple[tuple[int, str, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
  """Holds one answer; `error` says why there is none, and then the text is empty.

  `ids` are the chosen tokens without the one that ends a reply; with a stop string, up to the token
  that completed it. `margin` is the smallest lead, in logits, of a chosen token over the next best
  one. If it is below rounding errors (float32: about 1e-4), another machine may answer differently.
  `reason` says why the answer ended: at a stop id or a stop string, or at its most tokens.
  `prompt_tokens` counts text and image tokens, `tokens` those of the answer with one that ended it.
  `log_probabilities` belong to `ids`; None unless the settings ask for them.
  """

  text: str
  ids: tuple[int, ...]
  error: str = ""
  margin: float = float("inf")
  reason: Reason = "stop"
  prompt_tokens: int = 0
  tokens: int = 0
  log_probabilities: tuple[TokenLogProbability, ...] | None = None


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
  def text_ids(self) -> Int[np.ndarray, " t"]:
    """Returns the ids of its text."""
    return np.concatenate([piece.tokens[piece.slots < 0] for piece in self.pieces])

  @property
  def length(self) -> int:
    """Returns the number of positions of the whole prompt: text tokens and image tokens."""
    return self.pieces[-1].start + len(self.pieces[-1].tokens)


def key_of(picture: ImageFile) -> str:
  """Returns a text that identifies an image.

  It is made of the path for a file, and of a hash for bytes or decoded pixels. So a path and the
  bytes of its file have different keys.

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
  """Reads a picture with `reader`: its tiles, [M, size, size, 3] float32, and its token plan.

  Raises: SampleError if the picture is unreadable.
  """
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
  """Returns `key_of` of each image of a request. Raises: SampleError if one is not an image."""
  return tuple(map(key_of, request.images))


class LostImageError(SampleError):
  """Raised for a picture that was readable when its prompt was made, but no longer is.

  `key` is the picture's key (`key_of`).
  """

  def __init__(self, key: str, why: object):
    super().__init__(why)
    self.key = key
