"""Holds references to pictures: where one is, and its size if that is known without opening it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from PIL import Image

from llava_sp_jax import storage
from llava_sp_jax.data import decode, forms
from llava_sp_jax.data.failure import SampleError, SourceError, attempt, reason

HEAD = 1 << 16  # bytes at the beginning of a file, in which its size nearly always stands
Size = tuple[int, int]  # width and height in pixels
T = TypeVar("T")


class Picture(Protocol):
  """Refers to a picture; every method raises SampleError where it cannot be used."""

  @property
  def place(self) -> str:
    """Returns the path of the picture's file; "" for one that has no file of its own."""
    ...

  def size(self) -> Size:
    """Returns its size, from the header unless it is known."""
    ...

  def data(self) -> bytes:
    """Returns the content of its file."""
    ...

  def begin(self) -> Callable[[], bytes]:
    """Begins to read the content of its file, if that can be begun; returns what waits for it."""
    ...

  def decoded(self) -> contextlib.AbstractContextManager[Image.Image]:
    """Decodes it to RGB for the length of a block, as `decode.picture` does."""
    ...


@dataclasses.dataclass(frozen=True)
class InFile:
  """Refers to the file of a picture."""

  path: Path

  @property
  def place(self) -> str:
    return str(self.path)

  def size(self) -> Size:
    return decode.read_size(self.path)

  def data(self) -> bytes:
    return decode.read_bytes(self.path)

  def begin(self) -> Callable[[], bytes]:
    return self.data

  def decoded(self) -> contextlib.AbstractContextManager[Image.Image]:
    return decode.picture(self.path)


@dataclasses.dataclass(frozen=True)
class Stored:
  """Refers to a picture whose content is read by `read`, and which messages call `name`.

  `known` is its size, or the error that stands in its place. `begins` begins to read, where that can
  be begun, and returns what waits for the content.
  """

  name: str
  read: Callable[[], bytes]
  known: Size | SampleError | None = None
  place: str = ""
  begins: Callable[[], Callable[[], bytes]] | None = None

  def size(self) -> Size:
    if isinstance(self.known, SampleError):
      raise self.known
    return self.known or decode.read_size(io.BytesIO(self.data()), self.name)

  def data(self) -> bytes:
    return self._tried(self.read)

  def begin(self) -> Callable[[], bytes]:
    if self.begins is None:
      return self.data
    wait = self._tried(self.begins)
    return lambda: self._tried(wait)

  def _tried(self, call: Callable[[], T]) -> T:
    if isinstance(self.known, SampleError):
      raise self.known
    try:
      return call()
    except (SampleError, SourceError):
      raise
    except Exception as error:  # of the library that reads the format
      raise SampleError(f"image {self.name}: cannot be read ({reason(error)})") from None

  def decoded(self) -> contextlib.AbstractContextManager[Image.Image]:
    return decode.picture(io.BytesIO(self.data()), self.name)


@dataclasses.dataclass(frozen=True)
class Far:
  """Refers to the file of a picture in a bucket."""

  path: Path

  @property
  def place(self) -> str:
    return str(self.path)

  def size(self) -> Size:
    head = self._read(HEAD)
    try:
      return decode.read_size(io.BytesIO(head), self.place)
    except SampleError:
      if len(head) < HEAD:
        raise
    return decode.read_size(io.BytesIO(self.data()), self.place)  # the size stands further behind

  def data(self) -> bytes:
    return self._read(decode.MAX_BYTES)

  def begin(self) -> Callable[[], bytes]:
    return self.data

  def decoded(self) -> contextlib.AbstractContextManager[Image.Image]:
    return decode.picture(io.BytesIO(self.data()), self.place)

  def _read(self, limit: int) -> bytes:
    try:
      return storage.of(self.path).read(self.path, limit)
    except FileNotFoundError:
      raise decode.MissingImageError(f"image {self.path}: no such file") from None
    except OSError as error:
      raise SampleError(f"image {self.path}: cannot be read ({reason(error)})") from None


def in_folder(folder: Path, name: str) -> Picture:
  """Returns the picture of a file, whose name starts from `folder`."""
  path = folder / name
  return Far(path) if storage.remote(path) else InFile(path)


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Holds the content of a picture's file, or why it cannot be read."""

  picture: Picture
  content: bytes | SampleError

  @property
  def place(self) -> str:
    return self.picture.place

  def size(self) -> Size:
    return self.picture.size()

  def data(self) -> bytes:
    if isinstance(self.content, SampleError):
      raise self.content
    return self.content

  def begin(self) -> Callable[[], bytes]:
    return self.data

  def decoded(self) -> contextlib.AbstractContextManager[Image.Image]:
    name = self.place or getattr(self.picture, "name", "")
    return decode.picture(io.BytesIO(self.data()), name)


class WithPictures(dict[str, Any]):
  """Is a sample that knows its pictures, in the order of `forms.read(sample).images`."""

  def __init__(self, values: dict[str, Any], pictures: Sequence[Picture]):
    super().__init__(values)
    self.pictures = tuple(pictures)


def begin(sample: Any, find: Callable[[Any], Sequence[Picture]]) -> Callable[[], Any]:
  """Begins to read the files of all pictures of a sample.

  Returns what waits for the sample with their content. `find` returns the pictures of one that does
  not know them. A sample that cannot be read stays as it is. That it has as many pictures as it names
  is for `of` to say.
  """
  known = isinstance(sample, WithPictures)
  found = sample.pictures if known else attempt(lambda: find(sample))
  if isinstance(found, SampleError):
    return lambda: sample
  begun = [attempt(one.begin) for one in found]

  def loaded() -> WithPictures:
    contents = [one if isinstance(one, SampleError) else attempt(one) for one in begun]
    return WithPictures(sample, list(map(Loaded, found, contents)))

  return loaded


def of(sample: Any, folder: Path) -> tuple[Picture, ...]:
  """Returns the pictures of a sample; names of files start from `folder`.

  Raises: SampleError for a sample that cannot be read, or has not as many pictures as it names.
  """
  images = forms.read(sample).images
  if not isinstance(sample, WithPictures):
    return tuple(_of(image, number, sample, folder) for number, image in enumerate(images))
  if len(images) != len(sample.pictures):
    raise SampleError(f"{len(images)} images are named, but {len(sample.pictures)} are there")
  return sample.pictures


def _of(image: forms.Image, number: int, sample: dict[str, Any], folder: Path) -> Picture:
  if isinstance(image, str):
    return in_folder(folder, image)
  return Stored(f"{number} of sample {sample.get('id')!r:.60}", lambda: image)
