"""Defines random access to a data set of LLaVA-style dictionaries, in whatever format it is stored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from PIL import Image

from llava_sp_jax import storage
from llava_sp_jax.data import pictures
from llava_sp_jax.data.pictures import Picture, Size

Reader = Callable[[Image.Image], Any]  # preprocesses an image, e.g. `anyres.Reader`


class Source(Protocol):
  """Provides samples by index, in a form that `forms.read` reads, and the images of a sample.

  `source[index]` returns a SampleError in place of a sample that cannot be read. `far` tells whether
  reads take long, but many at a time take no longer.
  """

  far: bool

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Any: ...

  def pictures(self, sample: Any) -> Sequence[Picture]:
    """Returns the pictures of a sample. Raises: SampleError for a sample that cannot be read."""
    ...

  def images(self, sample: Any) -> list[Any]:
    """Returns the images of a sample, as the source's `Reader` makes them.

    Raises: SampleError when one cannot be read.
    """
    ...

  def sizes(self, sample: Any) -> list[Size]:
    """Returns (width, height) of each of a sample's images, from headers unless they are known.

    Raises: SampleError when one cannot be read.
    """
    ...

  def fingerprint(self) -> str:
    """Returns a hash of the samples and their order, equal for equal samples in any format.

    It does not cover the image files.
    """
    ...

  def former_fingerprint(self) -> str:
    """Returns the hash that earlier versions gave to the same samples; "" if there was none."""
    ...


class Samples:
  """Reads the images of samples, for the sources of all formats.

  Names of image files start from `folder`; `read` makes what the model needs of an image. A source
  that was sent to another process measures images there, but does not read them.
  """

  def __init__(self, folder: str, read: Reader):
    """Stores its arguments. Raises: FileNotFoundError when the folder does not exist."""
    self._folder, self._read = storage.place(folder), read
    self.far = storage.remote(folder)
    if folder and not self._folder.is_dir():
      raise FileNotFoundError(f"data.image_folder: no folder {folder!r}")

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_read": None}

  def pictures(self, sample: Any) -> Sequence[Picture]:
    """Returns the pictures of a sample. Raises: SampleError for a sample that cannot be read."""
    return pictures.of(sample, self._folder)

  def images(self, sample: Any) -> list[Any]:
    """Reads the images of a sample. Raises: SampleError when one cannot be read."""
    found = []
    for picture in self.pictures(sample):
      with picture.decoded() as image:
        found.append(self._read(image))
    return found

  def sizes(self, sample: Any) -> list[Size]:
    """Returns (width, height) of a sample's images. Raises: SampleError when one cannot be read."""
    return [picture.size() for picture in self.pictures(sample)]

  def former_fingerprint(self) -> str:
    """Returns "": earlier versions did not read this format."""
    return ""


def text(value: Any) -> Any:
  """Decodes bytes as UTF-8; returns any other value as it is."""
  return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def turns(value: Any) -> Any:
  """Converts the value of a table to a list of turns; leaves others for `forms` to refuse.

  A table holds turns as a text of JSON, or as a dictionary of sequences.
  """
  if isinstance(value, dict):
    columns = {key: [text(x) for x in column] for key, column in value.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
  if isinstance(value, list):
    return value
  try:
    return json.loads(text(value))
  except (TypeError, ValueError, RecursionError):
    return value
