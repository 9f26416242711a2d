"""Caches of the engine: pixels on the host; features, keys and values on the device.

Shape letters:  G rows of a group . T new positions . M tiles . N tokens per tile
"""

from __future__ import annotations

import concurrent.futures
import copy
import threading
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import anyres, example
from llava_sp_jax.data.failure import SampleError, attempt
from llava_sp_jax.infer.counts import Counts
from llava_sp_jax.infer.layout import ROUNDED, EngineLayout, bucket
from llava_sp_jax.infer.lru import Lru
from llava_sp_jax.infer.prefill import Group, Prefix
from llava_sp_jax.infer.programs import Programs
from llava_sp_jax.infer.requests import (
  ImageFile,
  LostImageError,
  PromptPiece,
  Request,
  keys_of,
  tiles_of,
)
from llava_sp_jax.models import build
from llava_sp_jax.models.arrays import Array

Features = tuple[Float[Array, "N D"], ...]  # one for each tile
Shared = tuple[Request, tuple[PromptPiece, ...]]  # a request and the first pieces of its prompt


class PictureCache:
  """Reads each picture once, whatever the number of threads, and keeps its pixels until taken.

  A picture's `key` is that of `requests.key_of`. It remembers at most `most` pictures, and forgets
  those that were read first.
  """

  def __init__(self, reader: anyres.Reader, most: int):
    self._reader, self.most = reader, most
    self._lock = threading.Lock()
    self._plans: dict[str, example.TokenPlan | Exception] = {}  # those that were read, oldest first
    self._reading: dict[str, concurrent.futures.Future[example.TokenPlan]] = {}
    self._tiles: dict[str, np.ndarray] = {}

  @classmethod
  def of(cls, config: config_lib.Config, most: int = ROUNDED.pictures) -> PictureCache:
    """Makes an empty cache that cuts pictures into tiles as `config` says."""
    return cls(anyres.Reader(config.data, anyres.Tile(*build.tile_shape(config.model))), most)

  def forget(self) -> None:
    """Drops all plans and pixels."""
    with self._lock:
      self._plans.clear()
      self._reading.clear()
      self._tiles.clear()

  def plan(self, key: str, picture: ImageFile) -> example.TokenPlan:
    """Returns the number of a picture's tiles and the order of their tokens, as a plan.

    The picture is read on the first call for its key.

    Raises: SampleError when the picture cannot be used.
    """
    with self._lock:
      if (known := self._plans.get(key)) is not None:
        return _plan(known)
      future = self._reading.get(key)
      mine = future is None
      if future is None:
        future = self._reading[key] = concurrent.futures.Future()
    if not mine:
      return future.result()
    try:
      picture_read = self._read(picture)
    except Exception as error:
      self._keep(key, copy.copy(error))  # the raised one holds its frames, and so the picture
      future.set_exception(error)
    else:
      self._keep(key, picture_read.plan, picture_read.tiles)
      future.set_result(picture_read.plan)
    return future.result()

  def _keep(
    self,
    key: str,
    found: example.TokenPlan | Exception,
    tiles: Float[np.ndarray, "M size size 3"] | None = None,
  ) -> None:
    with self._lock:
      if self._reading.pop(key, None) is None:  # all were forgotten meanwhile
        return
      self._plans[key] = found
      if tiles is not None:
        self._tiles[key] = tiles
      while len(self._plans) > self.most:
        oldest = next(iter(self._plans))
        del self._plans[oldest]
        self._tiles.pop(oldest, None)

  def tiles(self, key: str, picture: ImageFile) -> Float[np.ndarray, "M size size 3"]:
    """Takes the pixels of a picture, [tiles, size, size, 3] float32, out of the cache by its key.

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


def _plan(found: example.TokenPlan | Exception) -> example.TokenPlan:
  if isinstance(found, Exception):
    raise copy.copy(found)
  return found


class FeatureCache:
  """Keeps the features of images, at most `limit` bytes; drops the least recently used first."""

  def __init__(
    self, programs: Programs, pictures: PictureCache, counts: Counts, limit: int, tiles: int
  ):
    """Makes an empty cache of at most `limit` bytes.

    The tower always encodes `tiles` tiles at a time, so that features do not depend on other
    images.
    """
    self._programs, self._pictures, self._counts = programs, pictures, counts
    self._kept, self._tiles = Lru(limit), tiles
    self._seen: dict[str, None] = {}  # keys of pictures that were counted, oldest first

  def features(self, requests: Sequence[Request]) -> dict[str, Features]:
    """Returns {key: [N, D] for each tile} of all images of the requests.

    Encodes those that are not in the cache.

    Raises: LostImageError for an image that can no longer be read.
    """
    files: dict[str, ImageFile] = {}
    for request in requests:
      files.update(zip(keys_of(request), request.images, strict=True))
    found = {key: self._kept.get(key) for key in files}
    new = [key for key, kept in found.items() if kept is None]
    stacks = [self._pictures.tiles(key, files[key]) for key in new]
    encoded = self._encode(stacks)
    for key, features in zip(new, encoded, strict=True):
      found[key] = features
      self._kept.put(key, features)
    self._counts.encoder_calls += len(new)
    self._counts.distinct_images += sum(key not in self._seen for key in new)
    self._seen.update(dict.fromkeys(new))
    while len(self._seen) > self._pictures.most:
      del self._seen[next(iter(self._seen))]
    return found

  def _encode(self, stacks: list[Float[np.ndarray, "M H W 3"]]) -> list[Features]:
    if not stacks:
      return []
    flat = np.concatenate(stacks)
    done: list[jax.Array] = []
    for start in range(0, len(flat), self._tiles):
      part = flat[start : start + self._tiles]
      fill = np.zeros((self._tiles - len(part), *part.shape[1:]), part.dtype)
      done += self._programs.encode(np.concatenate([part, fill]))[: len(part)]
    rest = iter(done)
    return [tuple(next(rest) for _ in stack) for stack in stacks]


class PrefixCache:
  """Keeps keys and values of the shared pieces of prompts.

  `layout` has the bound in bytes, and what the positions of a piece are padded to.
  """

  def __init__(
    self, programs: Programs, features: FeatureCache, counts: Counts, layout: EngineLayout
  ):
    self._programs, self._features, self._counts = programs, features, counts
    self._kept, self._layout = Lru(layout.prefix_bytes), layout

  def capacity(self, pieces: Sequence[PromptPiece]) -> int:
    """Returns P, the positions that the prefix of these pieces is padded to; 0 for none."""
    if not pieces:
      return 0
    return self._padded(pieces[-1].start + len(pieces[-1].tokens))

  def _padded(self, length: int) -> int:
    return self._layout.rounded(length, self._layout.prefix)

  def shape(self, pieces: Sequence[PromptPiece]) -> tuple[int, ...]:
    """Returns the sizes that prefilling the last piece is compiled for.

    They are P with the piece, P before it, its padded positions T, and its tiles M.
    """
    last = pieces[-1]
    return (
      self.capacity(pieces),
      self.capacity(pieces[:-1]),
      self._length(last),
      len(last.tiles),
    )

  def _length(self, piece: PromptPiece) -> int:
    """Returns T; that of a piece with pictures is exact, because it has most of the work."""
    count = len(piece.tokens)
    return bucket(count, self._layout.prefix) if piece.tiles else self._padded(count)

  def of(self, asked: Sequence[Shared]) -> list[Prefix | None]:
    """Returns the prefix of each request, with all of its pieces; None for one without pieces.

    Prefills those that are not in the cache.
    """
    found: dict[str, Prefix] = {}
    depth: list[int] = []  # pieces of each that need not be computed
    for _, pieces in asked:
      kept = 0
      for level in range(len(pieces), 0, -1):
        key = pieces[level - 1].key
        if key in found or key in self._kept:
          found.setdefault(key, self._kept.get(key))
          kept = level
          break
      depth.append(kept)
    computed = 0
    for level in range(max((len(pieces) for _, pieces in asked), default=0)):
      missing = {
        pieces[level].key: (request, pieces[: level + 1])
        for (request, pieces), kept in zip(asked, depth, strict=True)
        if kept <= level < len(pieces)
      }
      ends = {pieces[-1].key for _, pieces in asked if len(pieces) == level + 1}
      computed += len(ends & missing.keys())
      self._compute(list(missing.values()), found)
    self._counts.prefix_hits += sum(bool(pieces) for _, pieces in asked) - computed
    return [found[pieces[-1].key] if pieces else None for _, pieces in asked]

  def _compute(self, missing: list[Shared], found: dict[str, Prefix]) -> None:
    """Prefills pieces, always as many at a time as there are data-parallel groups.

    So no prefix depends on the others in its batch.
    """
    alike: dict[tuple[int, ...], list[Shared]] = {}
    for request, pieces in missing:
      alike.setdefault(self.shape(pieces), []).append((request, pieces))
    parts = self._programs.parts
    for (capacity, _, length, _), members in alike.items():
      for start in range(0, len(members), parts):
        some = members[start : start + parts]
        full = [*some, *[some[0]] * (parts - len(some))]
        before = [found[p[-2].key] if len(p) > 1 else None for _, p in full]
        group = self.group([r for r, _ in full], [p[-1] for _, p in full], before, length)
        for (_, pieces), prefix in zip(some, self._programs.grow(group, capacity), strict=False):
          found[pieces[-1].key] = prefix
          self._kept.put(pieces[-1].key, prefix)
        self._counts.prefills += len(some)

  def group(
    self,
    requests: Sequence[Request],
    pieces: Sequence[PromptPiece],
    before: Sequence[Prefix | None],
    length: int,
  ) -> Group:
    """Batches pieces with equal numbers of tiles and prefixes of equal size.

    Args:
      requests: the request of each piece.
      pieces: the new positions of each row.
      before: the prefix that each piece follows; None where there is none.
      length: T, to which the pieces are padded.
    """
    tokens = np.zeros((len(pieces), length), np.int32)
    slots = np.full((len(pieces), length), -1, np.int32)
    for row, piece in enumerate(pieces):
      tokens[row, : len(piece.tokens)] = piece.tokens
      slots[row, : len(piece.slots)] = piece.slots
    tiles: tuple[Features, ...] = ()
    if pieces[0].tiles:
      features = self._features.features(requests)
      tiles = tuple(tuple(features[key][i] for key, i in piece.tiles) for piece in pieces)
    return Group(
      tokens,
      slots,
      np.asarray([len(p.tokens) for p in pieces], np.int32),
      np.asarray([p.start for p in pieces], np.int32),
      tuple(p for p in before if p is not None),
      tiles,
    )
