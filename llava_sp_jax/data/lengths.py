"""Measures the sizes of all samples in one pass over text and image headers.

Rows are planned from the sizes. The pass runs in several processes, and is divided among the hosts
of a run. Its result is saved in a file whose name is a hash of all that it depends on, so a resumed
run, or another run on the same data, does not repeat it. A new run measures those samples again that
could not be used, because what was missing may be there now. A resumed run plans its rows with the
samples that it began with.
"""

from __future__ import annotations

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax import storage
from llava_sp_jax.data import anyres, kept, samples
from llava_sp_jax.data.failure import SampleError, of_one_sample
from llava_sp_jax.data.measured import Found, Measured
from llava_sp_jax.data.packing import Sizes
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.data.source import Source
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.data.usable import Usable
from llava_sp_jax.progress import Progress

VERSION = 2  # of the file's format and of the code that measures
CHUNK = 256  # samples sent to a process at a time
ALONE = kept.SMALL  # up to so many samples are measured in this process: others start in seconds
SAY_EVERY = 10.0  # seconds between two lines about progress
# Settings that do not change a size. All others are part of the key, so a new one is not forgotten.
NOT_MEASURED = ("threads", "processes", "packing", "samples_per_batch", "samples_per_row",
                "bucket_lengths", "augment", "image_mean", "image_std", "path", "source", "tokenizer",
                "validation_path", "validation_fraction", "mixture")  # fmt: skip

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Hosts:
  """Tells a process which share of the samples it measures, and how it gets the other shares.

  `gather(text, name)` returns the `text` of every process, in their order; all must call it alike.
  """

  index: int
  count: int
  gather: Callable[[str, str], list[str]]


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
    usable: Usable | None = None,
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
      usable: remembers with which samples the run has begun (None: nothing is known of it).
    """
    self._source, self._tokenizer, self._data, self._tile = source, tokenizer, data, tile
    self._seed, self._quarantine, self._folder = seed, quarantine, folder
    self._say, self._hosts, self._name = say or (lambda line: None), hosts, name
    self._usable, self._several = usable or Usable(), hosts is not None
    self._pass = functools.lru_cache(maxsize=2)(self._found)

  def measured(self, epoch: int) -> Measured:
    """Returns the sizes of all samples in an epoch, and quarantines those that cannot be used.

    Raises: ConfigError when no sample can be used.
    """
    # Sizes differ between epochs only if turns are drawn at random.
    result = self._pass(epoch if self._data.turns_per_row else 0)
    for index, error in result.errors.items():
      self._quarantine.add(index, self._source[index], SampleError(error), self._name)
    return result

  def _found(self, epoch: int) -> Measured:
    key, hosts = self.key(epoch), self._hosts
    places = self._places(key)
    self._hosts = None
    found = next((known for path in places if (known := self._known(path))), None)
    again = self._usable.may_measure_again(key) and (hosts or not self._several)
    if hosts:
      mine = [found.digest() if found else "", bool(again)]
      said = [json.loads(text) for text in hosts.gather(json.dumps(mine), "lengths are known")]
      digests, again = {digest for digest, _ in said}, all(answer for _, answer in said)
      if "" in digests or len(digests) > 1:
        found = None  # all measure, since each needs the share of all others
    changed, result = found is None, found or Measured.empty(len(self._source))
    if found is None:
      self._measure(epoch, hosts, result, np.arange(len(result.lengths)))
    elif found.errors and again:
      changed = self._measure_again(epoch, hosts, found)
    if len(result.errors) == len(result.lengths):
      last = result.errors[len(result.lengths) - 1]
      raise config_lib.ConfigError(
        f"data: none of the {len(result.lengths)} samples can be used; the last: {last}"
      )
    where = f"data.mixture: {self._name}" if self._name else "data"
    of_run = self._usable.settle(key, result, where)
    if changed:
      self._keep(places, hosts, result)
    if self._usable.unknown:
      self._say(
        f"{where}: a former version has begun this run without a note of the samples that it can use; "
        f"{len(of_run.errors):,} cannot be used now"
      )
    return of_run

  def _measure_again(self, epoch: int, hosts: Hosts | None, found: Measured) -> bool:
    """Measures those samples again that could not be used; returns whether anything has changed."""
    before = set(found.errors)
    again = Measured.empty(len(found.lengths))
    indices = np.array(sorted(before))
    self._measure(epoch, hosts, again, indices)
    found.replace(indices, again.part(indices))
    return found.errors.keys() != before

  def _keep(self, places: Sequence[Path], hosts: Hosts | None, result: Measured) -> None:
    """Saves the sizes at the first of `places` that can be written.

    Only one process writes a file that all see; others write where they do not see it.
    """
    if not hosts or not hosts.index:
      _save(places, result)
    if hosts and hosts.gather("", "lengths are kept") and hosts.index:
      known = next((seen for path in places if (seen := Measured.load(path))), None)
      if not known or known.digest() != result.digest():
        _save(places, result)

  def _places(self, key: str) -> list[Path]:
    """Returns the files that may hold the sizes: beside data that are not small, in the folder."""
    name, path = f"lengths-{key}.npz", storage.place(self._data.path)
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

  def _measure(
    self, epoch: int, hosts: Hosts | None, result: Measured, indices: np.ndarray
  ) -> None:
    """Measures the samples of `indices`, divided among the hosts, and sets their sizes in `result`."""
    chunks = [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
    mine = chunks[hosts.index :: hosts.count] if hosts else chunks
    progress, told = Progress(sum(map(len, mine)), "samples"), time.monotonic()
    for chunk, part in zip(mine, self._parts(epoch, mine), strict=True):
      result.fill(chunk, part)
      progress.done += len(part)
      if time.monotonic() - told > SAY_EVERY:
        told = time.monotonic()
        self._say(f"measuring: {progress.line()}")
    if hosts:
      shares = [_joined(chunks[i :: hosts.count]) for i in range(hosts.count)]
      texts = hosts.gather(result.text(shares[hosts.index]), "lengths are measured")
      result.join(texts, shares)
    by = f" by {hosts.count} processes" if hosts and hosts.count > 1 else ""
    again = " again that could not be used" * (len(indices) < len(result.lengths))
    self._say(
      f"measured {len(indices):,} samples{again} in {progress.seconds:,.1f} s{by}: "
      f"{len(result.errors):,} cannot be used, {result.cut:,} are cut at "
      f"{self._data.row_length} tokens"
    )

  def _parts(self, epoch: int, chunks: Sequence[np.ndarray]) -> Iterator[list[Found]]:
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


def _save(places: Sequence[Path], result: Measured) -> None:
  """Saves sizes at the first of `places` that can be written. Raises: OSError when none can."""
  for path in places:
    with contextlib.suppress(OSError) if path != places[-1] else contextlib.nullcontext():
      result.save(path)
      break


def _joined(chunks: Sequence[np.ndarray]) -> np.ndarray:
  """Returns the indices of the samples of chunks."""
  return np.concatenate(chunks) if chunks else np.zeros(0, np.int64)


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


def _chunk(measure: samples.Measurer, source: Source, chunk: np.ndarray, epoch: int) -> list[Found]:
  return [_found(measure, source, epoch, int(index)) for index in chunk]


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


def _work(chunk: np.ndarray, epoch: int) -> list[Found]:
  return _chunk(*_process[0], chunk, epoch)
