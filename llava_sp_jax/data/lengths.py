"""Measures the sizes of all samples in one pass over text and image headers.

Rows are planned from the sizes. The pass runs in several processes, and is divided among the hosts
of a run. Its result is saved in a file whose name is a hash of all that it depends on, so a resumed
run, or another run on the same data, does not repeat it.
"""

from __future__ import annotations

import base64
import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax import storage
from llava_sp_jax.data import anyres, kept, samples
from llava_sp_jax.data.failure import SampleError, of_one_sample
from llava_sp_jax.data.packing import Sizes
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.data.source import Source
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.progress import Progress

VERSION = 2  # of the file's format and of the code that measures
CHUNK = 256  # samples sent to a process at a time
ALONE = kept.SMALL  # up to so many samples are measured in this process: others start in seconds
SAY_EVERY = 10.0  # seconds between two lines about progress
# Settings that do not change a size. All others are part of the key, so a new one is not forgotten.
NOT_MEASURED = ("threads", "processes", "packing", "samples_per_batch", "samples_per_row",
                "bucket_lengths", "augment", "image_mean", "image_std", "path", "source", "tokenizer",
                "validation_path", "validation_fraction", "mixture")  # fmt: skip
SIZES = ("lengths", "totals", "tiles")  # arrays of `Measured`

Say = Callable[[str], None]
Found = tuple[int, int, int, str]  # length, total, tiles, or (0, 0, 0, why it cannot be used)


@dataclasses.dataclass(frozen=True)
class Hosts:
  """Tells a process which share of the samples it measures, and how it gets the other shares.

  `gather(text, name)` returns the `text` of every process, in their order; all must call it alike.
  """

  index: int
  count: int
  gather: Callable[[str, str], list[str]]


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

  def fill(self, chunk: range, found: Sequence[Found]) -> None:
    """Sets the sizes of a chunk of samples."""
    for index, (length, total, tiles, error) in zip(chunk, found, strict=True):
      self.lengths[index], self.totals[index], self.tiles[index] = length, total, tiles
      if error:
        self.errors[index] = error

  def sizes(self) -> Sizes:
    """Returns the lengths in tokens, the tiles, and the indices of the usable samples.

    A sample is usable if its length is above 0; one that cannot be used has length 0.
    """
    usable = np.flatnonzero(self.lengths).astype(np.int32)
    return Sizes(self.lengths, self.tiles, usable)

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns all of it as arrays by name."""
    errors = np.array(json.dumps(sorted(self.errors.items())))
    return {"lengths": self.lengths, "totals": self.totals, "tiles": self.tiles, "errors": errors}

  @classmethod
  def of(cls, arrays: Mapping[str, np.ndarray]) -> Measured:
    """Returns what `arrays` has returned. Raises: KeyError, ValueError, TypeError for others."""
    errors = {int(i): str(error) for i, error in json.loads(str(arrays["errors"]))}
    return cls(arrays["lengths"], arrays["totals"], arrays["tiles"], errors)

  def save(self, path: Path) -> None:
    """Writes a file atomically. Raises: OSError when it cannot be written; no part remains."""
    kept.save(path, self.arrays())

  @classmethod
  def load(cls, path: Path) -> Measured | None:
    """Reads the file of an earlier pass; returns None if it is damaged in any way."""
    try:
      return cls.of(kept.load(path) or {})
    except (KeyError, ValueError, TypeError):
      return None

  def text(self, share: np.ndarray) -> str:
    """Returns the sizes of the samples of a share, by their indices, as text for other processes."""
    file = io.BytesIO()
    mine = {
      name: values[share] if values.ndim else values for name, values in self.arrays().items()
    }
    np.savez_compressed(file, **mine)  # type: ignore[arg-type]
    return base64.b64encode(file.getvalue()).decode()

  @classmethod
  def joined(cls, texts: Sequence[str], shares: Sequence[np.ndarray], count: int) -> Measured:
    """Joins what `text` has returned for the shares of all processes, of `count` samples together."""
    result = cls(**{name: np.zeros(count, np.int32) for name in SIZES}, errors={})
    for text, share in zip(texts, shares, strict=True):
      with np.load(io.BytesIO(base64.b64decode(text))) as file:
        found = cls.of({name: file[name] for name in file.files})
      for name in SIZES:
        getattr(result, name)[share] = getattr(found, name)
      result.errors.update(found.errors)
    return result


class Lengths:
  """Provides the sizes of samples in an epoch: measured, or from the file of an earlier pass."""

  def __init__(
    self,
    source: Source,
    tokenizer: Tokenizer,
    data: config_lib.DataConfig,
    tile: anyres.Tile,
    seed: int,
    quarantine: Quarantine,
    folder: Path | None = None,
    say: Say | None = None,
    hosts: Hosts | None = None,
    name: str = "",
  ):
    """Prepares the measuring.

    Args:
      source: the samples.
      tokenizer: the tokenizer of the run.
      data: the data settings of the run.
      tile: the tokens of one tile of the model.
      seed: the seed of the run, with which turns are drawn.
      quarantine: where samples that cannot be used are recorded.
      folder: where results are saved if they cannot be saved beside the data (None: nowhere).
      say: receives lines about progress.
      hosts: divides the first pass among the processes of a run (None: all is measured here).
        Later ones follow at different times, and are not divided.
      name: that of the source in a mixture.
    """
    self._source, self._tokenizer, self._data, self._tile = source, tokenizer, data, tile
    self._seed, self._quarantine, self._folder = seed, quarantine, folder
    self._say, self._hosts, self._name = say or (lambda line: None), hosts, name

  def measured(self, epoch: int) -> Measured:
    """Returns the sizes of all samples in an epoch, and quarantines those that cannot be used.

    Raises: ConfigError when no sample can be used.
    """
    # Sizes differ between epochs only if turns are drawn at random.
    result = self._pass(epoch if self._data.turns_per_row else 0)
    for index, error in result.errors.items():
      self._quarantine.add(index, self._source[index], SampleError(error), self._name)
    return result

  @functools.lru_cache(maxsize=2)  # noqa: B019 - lives as long as its process
  def _pass(self, epoch: int) -> Measured:
    places, hosts = self._places(epoch), self._hosts
    self._hosts = None
    found = next((known for path in places if (known := self._known(path))), None)
    if hosts and "no" in hosts.gather("yes" if found else "no", "lengths are known"):
      found = None  # all measure, since each needs the share of all others
    if found:
      return found
    result = self._measure(epoch, hosts)
    for path in places:
      with contextlib.suppress(OSError) if path != places[-1] else contextlib.nullcontext():
        result.save(path)
        break
    return result

  def _places(self, epoch: int) -> list[Path]:
    """Returns the files that may hold the sizes: beside data that are not small, in the folder."""
    name, path = f"lengths-{self.key(epoch)}.npz", storage.place(self._data.path)
    large = len(self._source) > kept.SMALL and path.exists()
    within = [self._folder / name] if self._folder else []
    return [*([kept.beside(path) / name] if large and self._folder else []), *within]

  def _known(self, path: Path) -> Measured | None:
    if not path.is_file():
      return None
    found = Measured.load(path)
    if not found:
      self._say(f"{path}: cannot be read; samples are measured again")
    return found

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
    return kept.key_of(about)

  def _measure(self, epoch: int, hosts: Hosts | None) -> Measured:
    count = len(self._source)
    chunks = [range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]
    mine = chunks[hosts.index :: hosts.count] if hosts else chunks
    result = Measured(**{name: np.zeros(count, np.int32) for name in SIZES}, errors={})
    progress, told = Progress(sum(map(len, mine)), "samples"), time.monotonic()
    for chunk, part in zip(mine, self._parts(epoch, mine), strict=True):
      result.fill(chunk, part)
      progress.done += len(part)
      if time.monotonic() - told > SAY_EVERY:
        told = time.monotonic()
        self._say(f"measuring: {progress.line()}")
    if hosts:
      shares = [_indices(chunks[i :: hosts.count]) for i in range(hosts.count)]
      texts = hosts.gather(result.text(shares[hosts.index]), "lengths are measured")
      result = Measured.joined(texts, shares, count)
    if len(result.errors) == count:
      raise config_lib.ConfigError(
        f"data: none of the {count} samples can be used; the last: {result.errors[count - 1]}"
      )
    by = f" by {hosts.count} processes" if hosts and hosts.count > 1 else ""
    self._say(
      f"measured {count:,} samples in {progress.seconds:,.1f} s{by}: {len(result.errors):,} cannot "
      f"be used, {result.cut:,} are cut at {self._data.row_length} tokens"
    )
    return result

  def _parts(self, epoch: int, chunks: Sequence[range]) -> Iterator[list[Found]]:
    """Yields the results for chunks of samples, in order. Raises: ConfigError when a process dies."""
    about = (self._data, self._tile, self._source, self._seed)
    processes = self._data.processes or os.cpu_count() or 1
    if processes == 1 or sum(map(len, chunks)) <= ALONE:
      measurer = _measurer(*about, self._tokenizer)
      yield from (_chunk(measurer, self._source, chunk, epoch) for chunk in chunks)
      return
    context = multiprocessing.get_context("spawn")  # threads of other libraries do not survive fork
    given = (*about, self._tokenizer.path)
    waiting: collections.deque[concurrent.futures.Future[list[Found]]] = collections.deque()
    done = 0
    try:
      with concurrent.futures.ProcessPoolExecutor(processes, context, _start, given) as pool:
        for chunk in chunks:
          waiting.append(pool.submit(_work, chunk, epoch))
          if len(waiting) > 4 * processes:  # bounds the results that wait
            yield waiting.popleft().result()
            done += CHUNK
        while waiting:
          yield waiting.popleft().result()
          done += CHUNK
    except concurrent.futures.process.BrokenProcessPool:
      raise config_lib.ConfigError(
        f"data.processes: a process that measures samples has died behind sample {done} (out of "
        f"memory, or by a picture's decoder); give fewer than {processes}, or look at these samples "
        "with llava-sp check"
      ) from None


def _indices(chunks: Sequence[range]) -> np.ndarray:
  """Returns the indices of the samples of chunks."""
  found = [np.arange(chunk.start, chunk.stop) for chunk in chunks]
  return np.concatenate(found) if found else np.zeros(0, np.int64)


def _measurer(
  data: config_lib.DataConfig,
  tile: anyres.Tile,
  source: Source,
  seed: int,
  tokenizer: Tokenizer,
) -> samples.Measurer:
  return samples.Measurer(
    samples.SampleEncoder(tokenizer, data), anyres.Reader(data, tile), source.sizes, seed
  )


def _chunk(measure: samples.Measurer, source: Source, chunk: range, epoch: int) -> list[Found]:
  return [_found(measure, source, epoch, index) for index in chunk]


def _found(measure: samples.Measurer, source: Source, epoch: int, index: int) -> Found:
  try:
    with of_one_sample():
      size = measure(source[index], epoch, index)
  except SampleError as error:
    return 0, 0, 0, str(error)
  return size.length, size.total, size.tiles, ""


# In a worker process, set by `_start`: its measurer, and the samples.
_process: list[tuple[samples.Measurer, Source]] = []


def _start(
  data: config_lib.DataConfig, tile: anyres.Tile, source: Source, seed: int, tokenizer: Path
) -> None:
  """Prepares a worker process; `tokenizer` is the folder of the tokenizer."""
  _process.append((_measurer(data, tile, source, seed, Tokenizer(tokenizer)), source))


def _work(chunk: range, epoch: int) -> list[Found]:
  return _chunk(*_process[0], chunk, epoch)
