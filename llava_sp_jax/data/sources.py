"""Provides random access to data sets of LLaVA-style dictionaries."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import lookup
from llava_sp_jax.data import decode, forms, sample_file, validation_split
from llava_sp_jax.data.failure import attempt

Reader = Callable[[Image.Image], Any]  # preprocesses an image, e.g. `anyres.Reader`
# Reads widths and heights of a sample's images from the headers of their files. It can be pickled
# without the samples. Raises: SampleError.
Sizes = Callable[[Any], list[tuple[int, int]]]
File = tuple[Path | BinaryIO, str]  # and its name in messages; "": its path


class Source(Protocol):
  """Provides samples by index, in a form that `forms.read` reads, and the images of a sample.

  `source[index]` returns a SampleError in place of a sample that cannot be read.
  """

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Any: ...

  def files(self, sample: Any) -> list[File]:
    """Returns the image files of a sample. Raises: SampleError for a sample that cannot be read."""
    ...

  def images(self, sample: Any) -> list[Any]:
    """Returns the images of a sample, as the source's `Reader` makes them.

    Raises: SampleError when one cannot be read.
    """
    ...

  @property
  def sizes(self) -> Sizes:
    """Returns a function that reads (width, height) of each of a sample's images."""
    ...

  def fingerprint(self) -> str:
    """Returns a hash of the samples and their order, as the source defines it.

    It does not cover the image files.
    """
    ...


class _Images:
  """Reads the images of samples from the files of a folder, or from bytes within the sample."""

  def __init__(self, folder: str, read: Reader):
    self._folder, self._read = Path(folder), read

  def files(self, sample: Any) -> list[File]:
    """Returns the image files of a sample. Raises: SampleError for a sample that cannot be read."""
    return _files(self._folder, sample)

  def images(self, sample: Any) -> list[Any]:
    """Reads the images of a sample. Raises: SampleError when one cannot be read."""
    found = []
    for file, name in self.files(sample):
      with decode.picture(file, name) as picture:
        found.append(self._read(picture))
    return found

  @property
  def sizes(self) -> Sizes:
    """Returns a function that reads (width, height) of each of a sample's images."""
    return functools.partial(_sizes, self._folder)


def _files(folder: Path, sample: Any) -> list[File]:
  images = forms.read(sample).images
  return [
    (folder / image, "")
    if isinstance(image, str)
    else (io.BytesIO(image), f"{number} of sample {sample.get('id')!r:.60}")
    for number, image in enumerate(images)
  ]


def _sizes(folder: Path, sample: Any) -> list[tuple[int, int]]:
  return [decode.read_size(file, name) for file, name in _files(folder, sample)]


class LlavaJson(_Images):
  """Reads a file of samples, and their images from a folder.

  Reads `blip_laion_cc_sbu_558k.json` and `llava_v1_5_mix665k.json` as they are published.
  """

  def __init__(self, path: str, image_folder: str, read: Reader, key: str = "data.path"):
    """Reads the file of samples.

    Args:
      path: the file.
      image_folder: the folder that names of images start from; "" is the current one.
      read: makes what the model needs of an image.
      key: the setting that names `path`, for messages.

    Raises:
      FileNotFoundError: when the file or the folder does not exist.
      ConfigError: when the file holds no samples.
    """
    self._samples, self._path = sample_file.read(path, key), Path(path)
    if image_folder and not Path(image_folder).is_dir():
      raise FileNotFoundError(f"data.image_folder: no folder {image_folder!r}")
    super().__init__(image_folder, read)

  def __len__(self) -> int:
    return len(self._samples)

  def __getitem__(self, index: int) -> Any:
    return self._samples[index]

  def fingerprint(self) -> str:
    """Returns the SHA-256 of the file of samples, in hexadecimal digits; images are not read."""
    with self._path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()


class Tfds(_Images):
  """Reads samples from TensorFlow Datasets, without tensorflow (array_record files only).

  Features are `id` (text), `conversations` (text with LLaVA's JSON list, or a sequence of
  `{from, value}`), and `image` (an Image, or a file's bytes; empty for a sample without one). The
  other keys that `forms` reads are supported as well: `messages`, `images`, `system`.
  """

  def __init__(self, path: str, image_folder: str, read: Reader, key: str = "data.path"):
    """Opens the split "train" of a data set.

    Args:
      path: the folder of a builder, or the name of a prepared data set.
      image_folder: the folder that names of images start from; bytes need none.
      read: makes what the model needs of an image.
      key: the setting that names `path`, for messages.

    Raises: ConfigError when there is no such data set or its files are not array_record.
    """
    import tensorflow_datasets as tfds  # slow to import

    try:
      builder = tfds.builder_from_directory(path) if Path(path).is_dir() else tfds.builder(path)
      # Images are decoded in `images`, so that a broken one fails its sample and not the run.
      pictures = [key for key in forms.IMAGES if key in builder.info.features]
      skip = {key: tfds.decode.SkipDecoding() for key in pictures} or None
      self._records = builder.as_data_source("train", decoders=skip)
    except (NotImplementedError, ImportError, ValueError, LookupError, OSError) as error:
      raise config_lib.ConfigError(
        f"{key}: {path!r} cannot be read ({str(error).splitlines()[0]}); expected a folder or "
        "name of TensorFlow Datasets with split 'train', prepared with file_format='array_record'"
      ) from None
    # The version, and the shards with their lengths, which change when a data set is prepared
    # again.
    self._about = f"{builder.info.full_name} {builder.info.splits['train'].to_proto()}"
    super().__init__(image_folder, read)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> Any:
    return attempt(lambda: self._sample(index))

  def _sample(self, index: int) -> dict[str, Any]:
    return {key: _plain(key, value) for key, value in self._records[index].items()}

  def fingerprint(self) -> str:
    """Returns a hash of the data set's name, version and shards; its values are not read."""
    return hashlib.sha256(self._about.encode()).hexdigest()


def _text(value: Any) -> Any:
  return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _plain(key: str, value: Any) -> Any:
  """Converts the value of a feature to that of a JSON file; leaves others for `forms` to refuse."""
  if key in forms.DIALOGUES:
    return _turns(value)
  if key in forms.IMAGES:
    return value if isinstance(value, bytes) else [bytes(file) for file in value]
  return _text(value)


def _turns(value: Any) -> Any:
  """Converts the value of a feature to a list of turns; leaves others for `forms` to refuse."""
  if isinstance(value, dict):  # a sequence of dictionaries arrives as a dictionary of sequences
    columns = {key: [_text(x) for x in column] for key, column in value.items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
  try:
    return json.loads(_text(value))
  except (TypeError, ValueError, RecursionError):
    return value


SOURCES: dict[str, Callable[[str, str, Reader, str], Source]] = {
  "llava_json": LlavaJson,
  "tfds": Tfds,
}


def of(data: config_lib.DataConfig, read: Reader, split: str = validation_split.TRAIN) -> Source:
  """Opens the samples of a split, TRAIN or VALIDATION of `validation_split`.

  `read` makes what the model needs of an image.

  Raises: ConfigError, FileNotFoundError for data that cannot be opened; the message names the
    setting.
  """
  make = lookup("data.source", data.source, SOURCES)
  path = validation_split.of_split(data, split).path
  return make(path, data.image_folder, read, validation_split.path_key(data, split))
