"""Reads tables in groups of rows: parquet files, and data sets that `datasets` has saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from llava_sp_jax import json_files, storage
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import forms, ranged

TRAIN = "train"  # the split that is read where a folder holds several
BYTES, PATH = "bytes", "path"  # fields of an image
STATE, SPLITS = "state.json", "dataset_dict.json"  # of a data set, of several splits


class Tables(Protocol):
  """Provides the rows of several files in groups, each a table of pyarrow."""

  paths: Sequence[Path]
  counts: list[int]  # rows of each group

  def schemas(self) -> Sequence[Any]:
    """Returns the schema of each file."""
    ...

  def texts(self, group: int) -> Any:
    """Returns a group, which may lack the bytes of images."""
    ...

  def images(self, group: int, column: str) -> Any:
    """Returns the images of a group, a column."""
    ...


class Parquet:
  """Reads parquet files; a group is a row group, which is decoded as a whole."""

  def __init__(self, paths: Sequence[Path]):
    """Reads the footers. Raises: ArrowException, OSError."""
    self.paths = paths
    self._open()
    self._groups = [
      (file, group) for file, one in enumerate(self._files) for group in range(one.num_row_groups)
    ]
    self.counts = [
      self._files[file].metadata.row_group(group).num_rows for file, group in self._groups
    ]

  def _open(self) -> None:
    import pyarrow.parquet

    far = any(map(storage.remote, self.paths))
    files = [ranged.Ranged(path) if far else path for path in self.paths]
    self._files = [pyarrow.parquet.ParquetFile(file, pre_buffer=far) for file in files]

  def __getstate__(self) -> dict[str, Any]:
    return {**self.__dict__, "_files": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def schemas(self) -> Sequence[Any]:
    return [file.schema_arrow for file in self._files]

  def texts(self, group: int) -> Any:
    file, number = self._groups[group]
    schema = self._files[file].schema
    leaves = [schema.column(i).path for i in range(len(schema.names))]
    wanted = [leaf for leaf in leaves if not _image_bytes(leaf)]
    return self._files[file].read_row_group(number, columns=wanted)

  def images(self, group: int, column: str) -> Any:
    file, number = self._groups[group]
    return self._files[file].read_row_group(number, columns=[column]).column(column)


def _image_bytes(leaf: str) -> bool:
  return leaf.split(".")[0] in forms.IMAGES and leaf.endswith(f".{BYTES}")


class Arrow:
  """Maps files of Arrow into memory, in either of its two formats; a group is a record batch."""

  def __init__(self, paths: Sequence[Path]):
    """Maps the files. Raises: ArrowException, OSError."""
    self.paths = paths
    self._open()
    self.counts = [batch.num_rows for _, batch in self._batches]

  def _open(self) -> None:
    import pyarrow

    self._schemas, self._batches = [], []
    for path in self.paths:
      mapped = pyarrow.memory_map(str(path))
      try:
        table = pyarrow.ipc.open_stream(mapped).read_all()
      except pyarrow.ArrowInvalid:
        table = pyarrow.ipc.open_file(mapped).read_all()
      self._schemas.append(table.schema)
      self._batches += [(path, batch) for batch in table.to_batches()]

  def __getstate__(self) -> dict[str, Any]:
    return {"paths": self.paths, "counts": self.counts}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._open()

  def schemas(self) -> Sequence[Any]:
    return self._schemas

  def texts(self, group: int) -> Any:
    return self._batches[group][1]

  def images(self, group: int, column: str) -> Any:
    return self._batches[group][1].column(column)


def parquet_files(path: Path) -> list[Path]:
  """Returns the parquet files of a data set in order; those of the split "train", if named so."""
  if path.is_file():
    return [path] if path.suffix == ".parquet" else []
  found = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
  return [file for file in found if file.name.startswith(TRAIN)] or found


def fits_parquet(path: Path) -> bool:
  """Returns whether a path is a parquet file, or a folder of them."""
  return bool(parquet_files(path))


def fits_arrow(path: Path) -> bool:
  """Returns whether a path is a folder that `save_to_disk` has written."""
  return (path / STATE).is_file() or (path / SPLITS).is_file()


def arrow_files(path: Path, key: str) -> list[Path]:
  """Returns the files of a saved data set in order. Raises: ConfigError for a damaged folder."""
  folder = path / TRAIN if (path / SPLITS).is_file() else path
  if not (folder / STATE).is_file():
    raise ConfigError(f"{key}: {folder} has no {STATE}; expected a data set saved by `datasets`")
  state = json_files.read_object(folder / STATE)
  if not json_files.fits(state, {"_data_files": [{"filename": str}]}):
    raise ConfigError(f"{key}: {folder / STATE} names no data files; save the data set again")
  if state.get("_indices_files"):
    raise ConfigError(f"{key}: {folder} has rows in another order; save flatten_indices() of it")
  return [folder / file["filename"] for file in state["_data_files"]]
