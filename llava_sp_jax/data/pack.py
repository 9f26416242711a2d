"""Writes a data set as shards of samples and shards of images, which `packed` reads.

Every sample keeps its place, also one that cannot be used: it stays unusable, with the same reason.
The content of image files is not changed. A picture that several samples name is written once.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_sp_jax import __version__, folders
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import decode, forms, packed, pictures, source
from llava_sp_jax.data.failure import SampleError, attempt
from llava_sp_jax.data.packed import IMAGES, INDEX, SAMPLES
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.errors import LlavaSPError

COMMAND = "data pack"
QUARANTINE = "quarantine.jsonl"
HOPELESS = 256  # so many unusable samples without another one mean that the arguments are wrong
AHEAD = 16  # samples that each thread reads ahead
# One record a group, for random access. Images are compressed already.
OPTIONS = {SAMPLES: "group_size:1,zstd:3", IMAGES: "group_size:1,uncompressed"}


class PackError(LlavaSPError, RuntimeError):
  """Raised when a shard cannot be written; names the file."""


@dataclasses.dataclass
class Counts:
  """Counts what was written."""

  samples: int = 0
  images: int = 0  # different ones
  bytes: int = 0  # of all shards
  bad: int = 0  # samples that cannot be used


class _Shards:
  """Writes records of one kind to shards, each of about `limit` bytes."""

  def __init__(self, folder: Path, kind: str, limit: int):
    self._folder, self._kind, self._limit = folder, kind, limit
    self._writer: Any = None
    self._path = folder
    self._records = self._bytes = self._all = 0  # of the open shard, and records of all
    self.done: list[dict[str, Any]] = []  # as the index has them

  @property
  def count(self) -> int:
    """Returns the number of records of all shards."""
    return self._all

  def write(self, record: bytes) -> int:
    """Writes a record, and returns its number among all of its kind. Raises: PackError."""
    with self._named():
      if self._writer is None:
        self._writer = self._opened()
      self._writer.write(record)
    self._records, self._bytes = self._records + 1, self._bytes + len(record)
    self._all += 1
    if self._bytes >= self._limit:
      self.close()
    return self._all - 1

  def _opened(self) -> Any:
    from array_record.python import array_record_module

    self._path = self._folder / f"{self._kind}-{len(self.done):05d}.array_record"
    part = f"{self._path}{folders.PART}"
    with open(part, "wb"):  # says why it cannot be written, as the writer does not
      return array_record_module.ArrayRecordWriter(part, OPTIONS[self._kind])

  def close(self) -> None:
    """Completes the open shard, which only then gets its name. Raises: PackError."""
    if self._writer is None:
      return
    part = Path(f"{self._path}{folders.PART}")
    with self._named():
      self._writer.close()
      with part.open("rb") as file:
        os.fsync(file.fileno())
      part.rename(self._path)
      size = self._path.stat().st_size
    self.done.append({"file": self._path.name, "records": self._records, "bytes": size})
    self._writer, self._records, self._bytes = None, 0, 0

  @contextlib.contextmanager
  def _named(self) -> Iterator[None]:
    try:
      yield
    except (RuntimeError, OSError) as error:  # of the writer; of files
      why = error.strerror if isinstance(error, OSError) else str(error)
      raise PackError(f"{self._path}: cannot be written ({why})") from None


@dataclasses.dataclass(frozen=True)
class _Image:
  """Holds what becomes of one image of a sample: its content, or the number of its record."""

  name: str
  place: str
  size: pictures.Size | None = None
  data: bytes | None = None  # None: written before, or unusable
  error: SampleError | None = None


@dataclasses.dataclass(frozen=True)
class _Read:
  """Holds a sample, its images, and the error that makes it unusable."""

  sample: Any
  images: tuple[_Image, ...] = ()
  error: SampleError | None = None


def _read(data: source.Source, written: Mapping[str, int], index: int) -> _Read:
  """Reads a sample and the images that are not `written` yet; never raises for a bad one."""
  sample = attempt(lambda: data[index])
  found = attempt(lambda: data.pictures(sample))
  if isinstance(found, SampleError):
    return _Read(sample, error=found)
  names = forms.read(sample).images
  images = tuple(_image(*pair, written) for pair in zip(names, found, strict=True))
  return _Read(sample, images, next((image.error for image in images if image.error), None))


def _image(name: forms.Image, picture: pictures.Picture, written: Mapping[str, int]) -> _Image:
  known = name if isinstance(name, str) else getattr(picture, "name", "")
  size = attempt(picture.size)
  if isinstance(size, SampleError):
    return _Image(known, picture.place, error=size)
  if picture.place in written:
    return _Image(known, picture.place, size)
  content = attempt(picture.data)
  if isinstance(content, SampleError):
    return _Image(known, picture.place, error=content)
  return _Image(known, picture.place, size, content)


def write(
  data: source.Source,
  out: Path,
  made_from: str,
  shard_bytes: int = 512 << 20,
  threads: int = 8,
  progress: Callable[[Counts], None] = lambda counts: None,
) -> Counts:
  """Writes a data set to a new folder, and returns the counts.

  The folder has another name until it is complete. Samples that cannot be used are listed in its
  quarantine.jsonl.

  Args:
    data: the samples.
    out: the folder, which must not exist or be empty.
    made_from: the path of `data`, for the index.
    shard_bytes: about how large a shard becomes.
    threads: threads that read samples and images.
    progress: called with the counts so far after every sample.

  Raises:
    ConfigError: when no sample can be used.
    FolderError: when `out` holds anything.
    PackError: when a shard cannot be written.
  """
  with folders.renamed(out, COMMAND) as folder:
    result, written = Counts(), dict[str, int]()
    shards = {kind: _Shards(folder, kind, shard_bytes) for kind in (SAMPLES, IMAGES)}
    quarantine = Quarantine(folder / QUARANTINE)
    for index, read in enumerate(_ahead(data, written, threads)):
      shards[SAMPLES].write(_record(read, shards[IMAGES], written))
      result.samples += 1
      result.images = shards[IMAGES].count
      if read.error:
        result.bad += 1
        quarantine.add(index, read.sample, read.error)
        if result.bad == result.samples == min(HOPELESS, len(data)):
          raise ConfigError(
            f"{made_from}: none of the first {result.bad} samples can be used; the last: {read.error}"
          )
      progress(result)
    for one in shards.values():
      one.close()
    result.bytes = sum(shard["bytes"] for one in shards.values() for shard in one.done)
    _write_index(folder, data, made_from, {kind: one.done for kind, one in shards.items()})
  return result


def _ahead(data: source.Source, written: Mapping[str, int], threads: int) -> Iterator[_Read]:
  """Yields all samples in order; threads read at most AHEAD each before they are taken."""
  waiting: collections.deque[concurrent.futures.Future[_Read]] = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    try:
      for index in range(len(data)):
        waiting.append(pool.submit(_read, data, written, index))
        if len(waiting) >= AHEAD * threads:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()
    finally:
      pool.shutdown(cancel_futures=True)


def _record(read: _Read, images: _Shards, written: dict[str, int]) -> bytes:
  """Writes the images of a sample, and returns the record of the sample."""
  record: dict[str, Any] = {"sample": _named(read), IMAGES: []}
  if isinstance(read.sample, SampleError):
    return json.dumps({"error": str(read.sample)}).encode()
  text = attempt(lambda: json.dumps(record["sample"]))
  if isinstance(text, SampleError):  # values that JSON does not have
    return json.dumps({"error": str(text)}).encode()
  for image in read.images:
    record[IMAGES].append(_about(image, images, written))
  return json.dumps(record).encode()


def _about(image: _Image, images: _Shards, written: dict[str, int]) -> dict[str, Any]:
  if image.error:
    missing = isinstance(image.error, decode.MissingImageError)
    return {"name": image.name, "error": str(image.error), packed.MISSING: missing}
  number = written.get(image.place)
  if number is None:
    assert image.data is not None  # else it would be in `written`
    number = images.write(image.data)
    if image.place:
      written[image.place] = number
  return {"name": image.name, "size": image.size, "record": number}


def _named(read: _Read) -> Any:
  """Returns a sample with names in place of images that stand in it as bytes."""
  if not isinstance(read.sample, dict):
    return read.sample
  names = [image.name for image in read.images]
  held = {key for key in forms.IMAGES if _bytes_in(read.sample.get(key))}
  return {key: names if key in held else value for key, value in read.sample.items()}


def _bytes_in(value: Any) -> bool:
  return any(isinstance(one, bytes) for one in (value if isinstance(value, list) else [value]))


def _write_index(
  folder: Path, data: source.Source, made_from: str, shards: Mapping[str, Any]
) -> None:
  index = {
    "format": packed.FORMAT,
    "version": packed.VERSION,
    "made_from": made_from,
    "made_by": f"llava-sp {__version__}",
    "fingerprint": data.fingerprint(),
    "former_fingerprint": data.former_fingerprint(),
    **shards,
  }
  part = folder / f"{INDEX}{folders.PART}"
  with folders.written(part), part.open("w") as file:
    file.write(json.dumps(index, indent=2) + "\n")
    file.flush()
    os.fsync(file.fileno())
  part.rename(folder / INDEX)
