"""Reads data sets that `llava-sp data pack` has written: shards of samples and shards of images.

A record of a sample is JSON: the sample, and the number and size of each of its images. So lengths
are measured without a look at the images. A record of an image is the content of its file.

From a bucket, images are read by ranges of bytes, and so are samples if there are many. Others are
copied to the disk first: a request for each would cost as much work as one for a picture.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_sp_jax import json_files, storage
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import decode, pictures, source
from llava_sp_jax.data.array_record import ArrayRecord
from llava_sp_jax.data.failure import SampleError, attempt

INDEX = "index.json"  # written last, so a folder without it is not complete
FORMAT, VERSION = "llava-sp packed", 1
SAMPLES, IMAGES = "samples", "images"  # kinds of shards, and keys of the index
MISSING = "missing"  # key of the error of an image whose file does not exist
OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # for random access
_SHARD = {"file": str, "records": int, "bytes": int}
_KIND = {"fingerprint": str, "former_fingerprint": str, SAMPLES: [_SHARD], IMAGES: [_SHARD]}
BUFFER = 1 << 15  # bytes that a reader holds
COPIED = 2 << 30  # bytes of samples, without images, that are copied from a bucket; more are not


def fits(path: Path) -> bool:
  """Returns whether a path is such a folder, or the rest of one."""
  return (path / INDEX).is_file() or any(path.glob(f"{SAMPLES}-*.array_record"))


class Records(Sequence[bytes]):
  """Reads records of several shards by their number; may be used by several threads."""

  def __init__(self, folder: Path, shards: Sequence[dict[str, Any]], copied: int = 0):
    """Stores where the records are; each shard has `file`, `records` and `bytes`.

    Shards in a bucket that have no more than `copied` bytes together are copied to the disk now, for
    this process and those that are given this object. Raises: OSError that names what fails.
    """
    self._paths = [folder / shard["file"] for shard in shards]
    if sum(shard["bytes"] for shard in shards) <= copied:
      self._paths = [storage.of(path).local(path) for path in self._paths]
    self._ends = list(itertools.accumulate(shard["records"] for shard in shards))
    self._reset()

  def _reset(self) -> None:
    self._readers: dict[int, Reader] = {}
    self._locks = [threading.Lock() for _ in self._paths]

  def __getstate__(self) -> dict[str, Any]:
    return {"_paths": self._paths, "_ends": self._ends}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._reset()

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, number: Any) -> Any:
    reader, at = self._place(number)
    return reader[at]

  def begin(self, number: int) -> Callable[[], bytes]:
    """Begins to read a record; returns what waits for it."""
    reader, at = self._place(number)
    return reader.begin(at)

  def _place(self, number: int) -> tuple[Reader, int]:
    """Returns the reader of a record's shard, and the number of the record in it."""
    shard = bisect.bisect_right(self._ends, number)
    first = self._ends[shard - 1] if shard else 0
    if shard not in self._readers:
      with self._locks[shard]:
        if shard not in self._readers:
          path = self._paths[shard]
          self._readers[shard] = ArrayRecord(path) if storage.remote(path) else OnDisk(path)
    return self._readers[shard], number - first


class OnDisk:
  """Reads records of a shard on a disk by their number, with the library of ArrayRecord."""

  def __init__(self, path: Path):
    """Opens the shard."""
    from array_record.python import array_record_module

    reader = array_record_module.ArrayRecordReader
    self._reader = reader(str(path), OPTIONS, file_reader_buffer_size=BUFFER)

  def __getitem__(self, number: int) -> bytes:
    return bytes(self._reader.read([number])[0])

  def begin(self, number: int) -> Callable[[], bytes]:
    """Returns what reads a record."""
    return functools.partial(self.__getitem__, number)


Reader = OnDisk | ArrayRecord


class Packed(source.Samples):
  """Reads the samples and images of a folder."""

  def __init__(self, path: str, image_folder: str, read: source.Reader, key: str = "data.path"):
    """Reads the index, compares the sizes of all shards with it, and copies samples (COPIED).

    Args:
      path: the folder.
      image_folder: not used; the shards hold the images.
      read: makes what the model needs of an image.
      key: the setting that names `path`, for messages.

    Raises: ConfigError when the folder is not complete; OSError for what cannot be copied.
    """
    super().__init__("", read)
    folder = storage.place(path)
    if not (folder / INDEX).is_file():
      raise ConfigError(
        f"{key}: {path} holds shards but no {INDEX}, so llava-sp data pack was interrupted; run it "
        "again"
      )
    self.far = storage.remote(folder)
    index = _index(folder / INDEX)
    if (index.get("format"), index.get("version")) != (FORMAT, VERSION):
      raise ConfigError(
        f"{key}: {folder / INDEX} is of {index.get('format')!r:.40} version "
        f"{index.get('version')!r:.20}; expected {FORMAT!r} version {VERSION}"
      )
    if not json_files.fits(index, _KIND):
      raise ConfigError(
        f"{key}: {folder / INDEX} is damaged; copy the folder again, or pack it again"
      )
    _check(folder, [*index[SAMPLES], *index[IMAGES]], key)
    self._samples = Records(folder, index[SAMPLES], COPIED)
    self._images = Records(folder, index[IMAGES])
    self._about = index

  def __len__(self) -> int:
    return len(self._samples)

  def __getitem__(self, index: int) -> Any:
    return attempt(lambda: self._sample(index))

  def _sample(self, index: int) -> Any:
    record = json.loads(self._samples[index])
    if "error" in record:
      raise SampleError(record["error"])
    if not isinstance(record["sample"], dict):
      return record["sample"]
    return pictures.WithPictures(record["sample"], [self._picture(p) for p in record[IMAGES]])

  def _picture(self, about: dict[str, Any]) -> pictures.Picture:
    if "error" in about:
      kind = decode.MissingImageError if about.get(MISSING) else SampleError
      return pictures.Stored(about["name"], bytes, kind(about["error"]))
    read = functools.partial(self._images.__getitem__, about["record"])
    begins = functools.partial(self._images.begin, about["record"])
    return pictures.Stored(about["name"], read, tuple(about["size"]), begins=begins)

  def fingerprint(self) -> str:
    """Returns the hash of the samples, as the index has it."""
    return str(self._about["fingerprint"])

  def former_fingerprint(self) -> str:
    """Returns the hash of the file that was packed, if earlier versions read that file."""
    return str(self._about["former_fingerprint"])


def _index(path: Path) -> json_files.Json:
  content = storage.of(path).read(path, json_files.MAX_BYTES + 1)
  return json_files.parse_object(content, str(path))


def _check(folder: Path, shards: Sequence[dict[str, Any]], key: str) -> None:
  """Compares the sizes of all shards with the index. Raises: ConfigError for the first other one."""
  paths = [folder / shard["file"] for shard in shards]
  stamps = storage.of(folder).stamps(paths)
  for path, shard, stamp in zip(paths, shards, stamps, strict=True):
    found = stamp and stamp[0]
    if found != shard["bytes"]:
      there = "is missing" if found is None else f"has {found:,} bytes"
      raise ConfigError(
        f"{key}: {path} {there}, expected {shard['bytes']:,} bytes; copy the folder again, or pack "
        "it again"
      )
