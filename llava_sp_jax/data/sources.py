"""Opens data sets: a table of the formats, which are told apart by what the path is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from llava_sp_jax import config as config_lib
from llava_sp_jax import storage
from llava_sp_jax.config import ConfigError, lookup
from llava_sp_jax.data import columns, packed, tables, validation_split, webdataset
from llava_sp_jax.data.llava_json import LlavaJson
from llava_sp_jax.data.source import Reader, Source
from llava_sp_jax.data.tfds import Tfds

AUTO = "auto"  # `data.source`: the first format below that fits the path


@dataclasses.dataclass(frozen=True)
class Format:
  """Defines a format of samples.

  `fits` tells whether a path that exists has this format, which `what` describes. `open` takes the
  path, the folder of images, the reader of images, and the setting that names the path.
  """

  what: str
  fits: Callable[[Path], bool]
  open: Callable[[str, str, Reader, str], Source]


SOURCES = {
  "packed": Format("a folder of llava-sp data pack", packed.fits, packed.Packed),
  "arrow": Format("a data set that `datasets` has saved", tables.fits_arrow, columns.arrow),
  "parquet": Format("parquet files", tables.fits_parquet, columns.parquet),
  "webdataset": Format("tars of WebDataset", webdataset.fits, webdataset.Tars),
  "tfds": Format("a TensorFlow data set", lambda path: (path / "features.json").is_file(), Tfds),
  "llava_json": Format("a JSON file of samples", lambda path: not path.is_dir(), LlavaJson),
}


def open_path(
  path: str, images: str, read: Reader, kind: str = AUTO, key: str = "data.path"
) -> Source:
  """Opens a data set.

  Args:
    path: its file or folder.
    images: the folder that names of image files start from; "" is the current one.
    read: makes what the model needs of an image.
    kind: a row of SOURCES, or AUTO.
    key: the setting that names `path`, for messages.

  Raises: ConfigError, FileNotFoundError for data that cannot be opened; OSError for what cannot be
    copied from a bucket.
  """
  row = _fitting(path, key) if kind == AUTO else lookup("data.source", kind, SOURCES)
  return row.open(path, images, read, key)


def _fitting(path: str, key: str) -> Format:
  """Returns the first format that fits a path; JSON, which says what is wrong, for an impossible one."""
  place = storage.place(path)
  try:
    row = next((row for row in SOURCES.values() if row.fits(place)), None)
  except (OSError, ValueError):
    row = SOURCES["llava_json"]
  if not row:
    raise ConfigError(
      f"{key}: {path!r:.200} is a folder without samples; expected one of: "
      + ", ".join(known.what for known in SOURCES.values())
    )
  return row


def of(data: config_lib.DataConfig, read: Reader, split: str = validation_split.TRAIN) -> Source:
  """Opens the samples of a split, TRAIN or VALIDATION of `validation_split`.

  `read` makes what the model needs of an image.

  Raises: ConfigError, FileNotFoundError for data that cannot be opened; the message names the
    setting.
  """
  path, key = validation_split.of_split(data, split).path, validation_split.path_key(data, split)
  return open_path(path, data.image_folder, read, data.source, key)
