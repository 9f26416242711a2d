"""Measures the sizes of all samples in one pass over text and image headers.

Rows are planned from the sizes. The pass runs in several processes. Its result is saved in a file
whose name is a hash of all that it depends on, so a resumed run, or another run on the same data,
does not repeat it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import functools
import hashlib
import io
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax import storage
from llava_sp_jax.data import anyres, samples, sources
from llava_sp_jax.data.failure import SampleError, of_one_sample
from llava_sp_jax.data.packing import Sizes
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.progress import Progress

VERSION = 1  # of the file's format and of the code that measures
CHUNK = 256  # samples sent to a process at a time
ALONE = 4096  # up to so many samples are measured in this process: others take seconds to start
SAY_EVERY = 10.0  # seconds between two lines about progress
# Settings that do not change a size. All others are part of the key, so a new one is not forgotten.
NOT_MEASURED = ("threads", "processes", "packing", "bucket_lengths", "augment", "image_mean",
                "image_std", "path", "tokenizer")  # fmt: skip

Say = Callable[[str], None]
Found = tuple[int, int, int, str]  # length, total, tiles, or (0, 0, 0, why it cannot be used)


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
  """Holds the sizes of all N samples; they are 0 for the samples in `errors`."""

  lengths: np.ndarray  # [N] int32, tokens in a row
  totals: np.ndarray  # [N] int32, tokens before truncation
  tiles: np.ndarray  # [N] int32
  errors: dict[int, str]  # index of a sample -> why it cannot be used

  @property
  def cut(self) -> int:
    """Returns how many samples are longer than a row, and therefore truncated."""
    return int(np.sum(self.totals > self.lengths))

  def sizes(self) -> Sizes:
    """Returns the lengths in tokens, the tiles, and the indices of the usable samples.

    A sample is usable if its length is above 0; one that cannot be used has length 0.
    """
    usable = np.flatnonzero(self.lengths).astype(np.int32)
    return Sizes(self.lengths, self.tiles, usable)


class Lengths:
  """Provides the sizes of samples in an epoch: measured, or from the file of an earlier pass."""

  def __init__(
    self,
    source: sources.Source,
    tokenizer: Tokenizer,
    data: config_lib.DataConfig,
    tile: anyres.Tile,
    seed: int,
    quarantine: Quarantine,
    folder: Path | None = None,
    say: Say | None = None,
  ):
    """Prepares the measuring.

    Args:
      source: the samples.
      tokenizer: the tokenizer of the run.
      data: the data settings of the run.
      tile: the tokens of one tile of the model.
      seed: the seed of the run, with which turns are drawn.
      quarantine: where samples that cannot be used are recorded.
      folder: where results are saved (None: nowhere).
      say: receives lines about progress.
    """
    self._source, self._tokenizer, self._data, self._tile = source, tokenizer, data, tile
    self._seed, self._quarantine, self._folder = seed, quarantine, folder
    self._say = say or (lambda line: None)

  def measured(self, epoch: int) -> Measured:
    """Returns the sizes of all samples in an epoch, and quarantines those that cannot be used.

    Raises: ConfigError when no sample can be used.
    """
    # Sizes differ between epochs only if turns are drawn at random.
    result = self._pass(epoch if self._data.turns_per_row else 0)
    for index, error in result.errors.items():
      self._quarantine.add(index, self._source[index], SampleError(error))
    return result

  @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as its process
  def _pass(self, epoch: int) -> Measured:
    path = self._folder / f"lengths-{self.key(epoch)}.npz" if self._folder else None
    if path and path.is_file():
      if found := _load(path):
        return found
      self._say(f"{path}: cannot be read; samples are measured again")
    result = self._measure(epoch)
    if path:
      _save(result, path)
    return result

  def sizes(self, epoch: int) -> Sizes:
    """Returns the sizes of all samples in an epoch, and which can be used, for `packing.Stream`.

    Quarantines the others. Raises: ConfigError when no sample can be used.
    """
    return self.measured(epoch).sizes()

  def key(self, epoch: int) -> str:
    """Returns a hash of all that the sizes of an epoch depend on, except the image files."""
    data = dataclasses.asdict(self._data)
    about = {
      "version": VERSION,
      "source": self._source.fingerprint(),
      "tile": self._tile.__dict__,
      "tokenizer": self._tokenizer.fingerprint(),
      "data": {k: v for k, v in data.items() if k not in NOT_MEASURED},
      "draws": [self._seed, epoch] if self._data.turns_per_row else None,
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]

  def _measure(self, epoch: int) -> Measured:
    count = len(self._source)
    progress, told = Progress(count, "samples"), time.monotonic()
    found: list[Found] = []
    last = ""
    for part in self._parts(epoch):
      found += part
      last = next((error for *_, error in reversed(part) if error), last)
      progress.done = len(found)
      if time.monotonic() - told > SAY_EVERY:
        told = time.monotonic()
        self._say(f"measuring: {progress.line()}")
    lengths, totals, tiles = np.array([f[:3] for f in found], np.int32).T
    errors = {i: f[3] for i, f in enumerate(found) if f[3]}
    if len(errors) == count:
      raise config_lib.ConfigError(
        f"data: none of the {count} samples can be used; the last: {last}"
      )
    result = Measured(lengths, totals, tiles, errors)
    self._say(
      f"measured {count:,} samples in {progress.seconds:,.1f} s: {len(errors):,} cannot "
      f"be used, {result.cut:,} are cut at {self._data.row_length} tokens"
    )
    return result

  def _parts(self, epoch: int) -> Iterator[list[Found]]:
    """Yields the results for all samples, CHUNK at a time and in order.

    Raises: ConfigError when a process dies.
    """
    about = (self._data, self._tile, self._source.sizes, self._seed)
    count = len(self._source)
    chunks = [range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]
    processes = self._data.processes or os.cpu_count() or 1

    measurer = functools.cache(lambda: _measurer(*about, self._tokenizer))

    def here(chunk: range) -> list[Found]:
      return _chunk(measurer(), [self._source[i] for i in chunk], epoch, chunk.start)

    if processes == 1 or count <= ALONE:
      yield from map(here, chunks)
      return
    context = multiprocessing.get_context("spawn")  # threads of other libraries do not survive fork
    given = (*about, self._tokenizer.path)
    waiting: collections.deque[tuple[range, concurrent.futures.Future[list[Found]]]] = (
      collections.deque()
    )
    done = 0

    def found() -> list[Found]:
      chunk, future = waiting.popleft()
      try:
        return future.result()
      except RecursionError:  # a sample is nested too deeply to be pickled
        return here(chunk)

    try:
      with concurrent.futures.ProcessPoolExecutor(processes, context, _start, given) as pool:
        for chunk in chunks:
          parts = [self._source[i] for i in chunk]
          waiting.append((chunk, pool.submit(_work, parts, epoch, chunk.start)))
          if len(waiting) > 4 * processes:  # bounds the samples in the queue
            yield found()
            done += CHUNK
        while waiting:
          yield found()
          done += CHUNK
    except concurrent.futures.process.BrokenProcessPool:
      raise config_lib.ConfigError(
        f"data.processes: a process that measures samples has died behind sample {done} (out of "
        f"memory, or by a picture's decoder); give fewer than {processes}, or look at these samples "
        "with llava-sp check"
      ) from None


def _measurer(
  data: config_lib.DataConfig,
  tile: anyres.Tile,
  sizes: sources.Sizes,
  seed: int,
  tokenizer: Tokenizer,
) -> samples.Measurer:
  return samples.Measurer(
    samples.SampleEncoder(tokenizer, data), anyres.Reader(data, tile), sizes, seed
  )


def _chunk(measure: samples.Measurer, chunk: Sequence[Any], epoch: int, first: int) -> list[Found]:
  found: list[Found] = []
  for index, sample in enumerate(chunk, first):
    found.append(_found(measure, sample, epoch, index))
  return found


def _found(measure: samples.Measurer, sample: Any, epoch: int, index: int) -> Found:
  try:
    with of_one_sample():
      size = measure(sample, epoch, index)
  except SampleError as error:
    return 0, 0, 0, str(error)
  return size.length, size.total, size.tiles, ""


_process: list[samples.Measurer] = []  # in a worker process: its measurer, set by `_start`


def _start(
  data: config_lib.DataConfig, tile: anyres.Tile, sizes: sources.Sizes, seed: int, tokenizer: Path
) -> None:
  """Prepares a worker process; `tokenizer` is the folder of the tokenizer."""
  _process.append(_measurer(data, tile, sizes, seed, Tokenizer(tokenizer)))


def _work(chunk: Sequence[Any], epoch: int, first: int) -> list[Found]:
  return _chunk(_process[0], chunk, epoch, first)


def _save(measured: Measured, path: Path) -> None:
  """Writes a file atomically. Raises: OSError when it cannot be written; no part of it remains."""
  errors, file = json.dumps(sorted(measured.errors.items())), io.BytesIO()
  np.savez(
    file,
    lengths=measured.lengths,
    totals=measured.totals,
    tiles=measured.tiles,
    errors=np.array(errors),
  )
  store = storage.of(path)
  store.make(path.parent)
  store.put(path, file.getvalue())


def _load(path: Path) -> Measured | None:
  """Reads the file of an earlier pass; returns None if it is damaged in any way."""
  try:
    with np.load(io.BytesIO(storage.of(path).content(path))) as file:
      errors = {int(i): str(error) for i, error in json.loads(str(file["errors"]))}
      return Measured(file["lengths"], file["totals"], file["tiles"], errors)
  except Exception:
    return None
