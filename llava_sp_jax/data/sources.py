"""Where samples come from: random-access sources of LLaVA-style dictionaries."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import image as image_lib
from llava_sp_jax.data.conversation import SampleError

Reader = Callable[[Image.Image], Any]  # a picture into what the model takes
# Widths and heights of a sample's images, from the heads of their files; it goes to other processes
# without the samples. Raises: SampleError.
Sizes = Callable[[dict[str, Any]], list[tuple[int, int]]]


class Source(Protocol):
  """Samples `{"id", "conversations"}` by index, and the images of a sample, read by a `Reader`.

  `fingerprint` changes when the samples do; the images are not looked at for it.
  """

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> dict[str, Any]: ...
  def images(self, sample: dict[str, Any]) -> list[Any]: ...
  @property
  def sizes(self) -> Sizes: ...
  def fingerprint(self) -> str: ...


class LlavaJson:
  """LLaVA's own format: a JSON list of conversations beside a folder of images.

  Serves `blip_laion_cc_sbu_558k.json` and `llava_v1_5_mix665k.json` as they are published.
  """

  def __init__(self, path: str, image_folder: str, read: Reader):
    """Raises: FileNotFoundError, or ConfigError when the file is not such a list."""
    if not Path(path).is_file():
      raise FileNotFoundError(f"data.path: no file {path!r}; expected a LLaVA JSON list")
    try:
      samples = _parsed(path, Path(path).stat().st_mtime_ns)
    except json.JSONDecodeError as error:
      raise config_lib.ConfigError(
        f"data.path: {path} is not JSON ({error}); expected a LLaVA list of conversations"
      ) from None
    if not isinstance(samples, list) or not samples:
      raise config_lib.ConfigError(f"data.path: {path} is not a list with at least one sample")
    if image_folder and not Path(image_folder).is_dir():
      raise FileNotFoundError(f"data.image_folder: no folder {image_folder!r}")
    self._samples, self._folder, self._read = samples, Path(image_folder), read
    self._path = Path(path)

  def __len__(self) -> int:
    return len(self._samples)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._samples[index]

  def images(self, sample: dict[str, Any]) -> list[Any]:
    """What the reader makes of each. Raises: SampleError when one cannot be read."""
    return [self._read(image_lib.read(path)) for path in _paths(self._folder, sample)]

  @property
  def sizes(self) -> Sizes:
    return functools.partial(_sizes_of_files, self._folder)

  def fingerprint(self) -> str:
    with self._path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()


def _paths(folder: Path, sample: dict[str, Any]) -> list[Path]:
  names = sample.get("image", [])
  names = [names] if isinstance(names, str) else names
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise SampleError(f"`image` must be a file name or a list of them, found {names!r:.60}")
  return [folder / name for name in names]


def _sizes_of_files(folder: Path, sample: dict[str, Any]) -> list[tuple[int, int]]:
  return [image_lib.read_size(path) for path in _paths(folder, sample)]


@functools.lru_cache(maxsize=2)
def _parsed(path: str, changed: int) -> Any:
  """What the file holds; kept, since training and validation may read the same large one."""
  return json.loads(Path(path).read_text())


class Tfds:
  """The same samples from TensorFlow Datasets, read without tensorflow (array_record files).

  Features: `id` (text), `conversations` (text with LLaVA's JSON list, or a sequence of
  `{from, value}`), and `image` (an Image, or a file's bytes; empty for a sample about text).
  """

  def __init__(self, path: str, image_folder: str, read: Reader):
    """`path` is a builder's folder or the name of a prepared data set; its split "train" is read.

    Raises: ConfigError when there is no such data set or its files are not array_record.
    """
    import tensorflow_datasets as tfds  # slow to import

    try:
      builder = tfds.builder_from_directory(path) if Path(path).is_dir() else tfds.builder(path)
      # Images are decoded in `images`, so that a broken one costs its sample and not the run.
      skip = {"image": tfds.decode.SkipDecoding()} if "image" in builder.info.features else None
      self._records = builder.as_data_source("train", decoders=skip)
    except (NotImplementedError, ImportError, ValueError, LookupError, OSError) as error:
      raise config_lib.ConfigError(
        f"data.path: {path!r} cannot be read ({str(error).splitlines()[0]}); expected a folder or "
        "name of TensorFlow Datasets with split 'train', prepared with file_format='array_record'"
      ) from None
    # Its version, and the shards with their lengths; a data set that is prepared anew has another.
    self._about = f"{builder.info.full_name} {builder.info.splits['train'].to_proto()}"
    self._read = read

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    record = self._records[index]
    sample = {"id": _text(record.get("id", "")), "conversations": _turns(record["conversations"])}
    return {**sample, "image": record["image"]} if record.get("image") else sample

  def images(self, sample: dict[str, Any]) -> list[Any]:
    """What the reader makes of each. Raises: SampleError when one cannot be read."""
    return [self._read(image_lib.read(file, name)) for file, name in _files(sample)]

  @property
  def sizes(self) -> Sizes:
    return _sizes_of_bytes

  def fingerprint(self) -> str:
    return hashlib.sha256(self._about.encode()).hexdigest()


def _files(sample: dict[str, Any]) -> list[tuple[io.BytesIO, str]]:
  name = f"of sample {sample['id']!r}"
  return [(io.BytesIO(sample["image"]), name)] if "image" in sample else []


def _sizes_of_bytes(sample: dict[str, Any]) -> list[tuple[int, int]]:
  return [image_lib.read_size(file, name) for file, name in _files(sample)]


def _text(value: Any) -> Any:
  return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _turns(value: Any) -> Any:
  """A list of {from, value}; what is not one is left for the template to refuse."""
  if isinstance(value, dict):  # a sequence of dictionaries arrives as a dictionary of sequences
    columns = ([_text(x) for x in value[key]] for key in ("from", "value"))
    return [{"from": who, "value": what} for who, what in zip(*columns, strict=True)]
  try:
    return json.loads(_text(value))
  except (TypeError, json.JSONDecodeError):
    return value


SOURCES: dict[str, Callable[[str, str, Reader], Source]] = {
  "llava_json": LlavaJson,
  "tfds": Tfds,
}
