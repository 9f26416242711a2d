"""Reads tars of WebDataset: `KEY.json` is a sample, `KEY.jpg` or `KEY.0.jpg`, .. are its pictures.

The tars are read through once for the offsets of their members, and are not unpacked.
"""

from __future__ import annotations

import array
import concurrent.futures
import dataclasses
import functools
import itertools
import re
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax import storage
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import content, forms, kept, pictures, ranged, sample_text, source
from llava_sp_jax.data.failure import SampleError, SourceError, attempt
from llava_sp_jax.stores.store import Opened

TOGETHER = 16  # tars in a bucket whose headers are read at the same time
VERSION = 1  # of the arrays that are kept
JSON = "json"
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "avif")
_NUMBERS = re.compile(r"(\d+)")


def fits(path: Path) -> bool:
  """Returns whether a path is a tar, or a folder of them."""
  return bool(tars(path))


def tars(path: Path) -> list[Path]:
  """Returns the tars of a data set, in order."""
  if path.is_file():
    return [path] if path.suffix == ".tar" else []
  return sorted(path.glob("*.tar"))


@dataclasses.dataclass(frozen=True)
class _Member:
  """Refers to a member of a tar; without a size, `name` is what is wrong with its sample."""

  name: str
  offset: int = 0
  size: int = -1

  @property
  def key(self) -> str:
    """Returns the name up to the first dot behind the last slash."""
    return self.name[: -len(self.extension) - 1] if self.extension else self.name

  @property
  def extension(self) -> str:
    """Returns what follows that dot."""
    return self.name.rpartition("/")[2].partition(".")[2]


class Index:
  """Holds where the members of N samples are, in arrays: first the JSON, then the pictures."""

  # tar [N], end [N] of a sample's members; offset, size [M] of a member; text and its ends [M]
  ARRAYS = ("tar", "end", "offset", "size", "text", "text_end")

  def __init__(self, arrays: dict[str, np.ndarray]):
    self.arrays = arrays

  def __len__(self) -> int:
    return len(self.arrays["end"])

  def members(self, index: int) -> tuple[int, list[_Member]]:
    """Returns the tar of a sample, and its members."""
    a = self.arrays
    first = int(a["end"][index - 1]) if index else 0
    found = []
    for i in range(first, int(a["end"][index])):
      begin = int(a["text_end"][i - 1]) if i else 0
      text = bytes(a["text"][begin : a["text_end"][i]]).decode("utf-8", "surrogateescape")
      found.append(_Member(text, int(a["offset"][i]), int(a["size"][i])))
    return int(a["tar"][index]), found


def read_index(paths: Sequence[Path]) -> Index:
  """Reads the headers of all tars. Raises: ConfigError for one that is damaged."""
  numbers: dict[str, array.array[int]] = {
    name: array.array("q") for name in Index.ARRAYS if name != "text"
  }
  text = bytearray()
  for tar, found in enumerate(_all_members(paths)):
    for members in _grouped(found):
      for member in _in_order(members):
        text += member.name.encode("utf-8", "surrogateescape")
        values = {"offset": member.offset, "size": member.size, "text_end": len(text)}
        for name, value in values.items():
          numbers[name].append(value)
      numbers["tar"].append(tar)
      numbers["end"].append(len(numbers["size"]))
  arrays = {name: np.array(values, np.int64) for name, values in numbers.items()}
  return Index({**arrays, "text": np.frombuffer(bytes(text), np.uint8)})


def _all_members(paths: Sequence[Path]) -> Iterator[Iterator[_Member]]:
  """Yields the members of each tar; reads several at a time where they are far away."""
  if not any(map(storage.remote, paths)):
    yield from map(_members, paths)
    return
  with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
    for start in range(0, len(paths), TOGETHER):
      yield from map(iter, pool.map(list, map(_members, paths[start : start + TOGETHER])))


def _members(path: Path) -> Iterator[_Member]:
  try:
    with ranged.buffered(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
      while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
        if member.isfile():
          yield _Member(member.name, member.offset_data, member.size)
      file.seek(tar.offset)
      if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end mark")
  except (tarfile.TarError, OSError) as error:
    raise ConfigError(
      f"{path}: cannot be read as a tar ({error}); expected a whole one that is not compressed"
    ) from None


def _grouped(members: Iterator[_Member]) -> Iterator[list[_Member]]:
  for _, group in itertools.groupby(members, key=lambda member: member.key):
    yield list(group)


def _in_order(members: list[_Member]) -> list[_Member]:
  """Returns the JSON and the pictures of a sample, or one member that says what is wrong."""
  kinds = {member: member.extension.lower().rpartition(".")[2] for member in members}
  texts = [member for member in members if member.extension.lower() == JSON]
  if len(texts) != 1:
    return [_Member(f"{members[0].key} has {len(texts)} members .{JSON}, expected one")]
  found = [member for member, kind in kinds.items() if kind in PICTURES]
  rest = [m.name for m in members if m not in (*texts, *found) and forms.is_medium(m.name)]
  if rest:
    return [_Member(f"{rest[0]} is not read; expected .{JSON} and pictures")]
  return [*texts, *sorted(found, key=lambda member: _natural(member.extension))]


def _natural(text: str) -> list[tuple[int, str]]:
  """Returns a key by which 2.jpg comes before 10.jpg."""
  return [(int(part), "") if part.isdigit() else (-1, part) for part in _NUMBERS.split(text)]


class Tars(source.Samples):
  """Reads samples and their pictures from tars."""

  def __init__(self, path: str, image_folder: str, read: source.Reader, key: str = "data.path"):
    """Reads the headers of all members, or what an earlier start has kept of them.

    Args:
      path: a tar, or a folder of tars.
      image_folder: not used; pictures stand in the tars.
      read: makes what the model needs of an image.
      key: the setting that names `path`, for messages.

    Raises: ConfigError for a tar that is damaged, or holds no samples.
    """
    super().__init__("", read)
    self.far = storage.remote(path)
    self._path, self._tars = path, tars(storage.place(path))
    self._stamps = kept.stamps(self._tars)
    name = f"members-{kept.key_of(VERSION, self._stamps)}.npz"
    known = kept.load(kept.beside(path) / name)
    self._index = Index(known) if known else read_index(self._tars)
    if not len(self._index):
      raise ConfigError(f"{key}: {path} holds no samples; expected members KEY.{JSON}, KEY.jpg")
    if not known and len(self._index) > kept.SMALL:
      kept.save_in(kept.beside(path), name, self._index.arrays)
    self._reset()

  def _reset(self) -> None:
    self._files: dict[int, Opened] = {}
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in super().__getstate__().items() if k not in ("_files", "_lock")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._reset()

  def __len__(self) -> int:
    return len(self._index)

  def __getitem__(self, index: int) -> Any:
    return attempt(lambda: self._sample(index))

  def _sample(self, index: int) -> Any:
    tar, (first, *found) = self._index.members(index)
    where = self._tars[tar].name
    if first.size < 0:
      raise SampleError(f"{where}: {first.name}")
    sample = sample_text.sample(f"{where}, {first.name}", 0, self._content(tar, first))
    if not isinstance(sample, dict):
      return sample
    if found and not any(sample.get(key) for key in forms.IMAGES):
      sample["images"] = [member.name for member in found]
    names = [f"{where}, {member.name}" for member in found]
    stored = [
      pictures.Stored(
        name,
        functools.partial(self._content, tar, member),
        begins=functools.partial(self._begun, tar, member),
      )
      for name, member in zip(names, found, strict=True)
    ]
    return pictures.WithPictures(sample, stored)

  def _content(self, tar: int, member: _Member) -> bytes:
    return self._begun(tar, member)()

  def _begun(self, tar: int, member: _Member) -> Callable[[], bytes]:
    """Begins to read the content of a member; returns what waits for it.

    Raises: SourceError when its tar has changed.
    """
    path = self._tars[tar]
    with self._lock:
      if tar not in self._files:
        file = storage.of(path).opened(path)
        if (file.size, file.version) != self._stamps[tar][1:]:
          raise SourceError(f"{path} has changed since its members were found; start again")
        self._files[tar] = file
    return self._files[tar].begin_at(member.offset, member.size)

  def fingerprint(self) -> str:
    """Returns the hash of the samples, in hexadecimal digits; pictures are not read."""
    return content.of(self, self._path, self._tars)
