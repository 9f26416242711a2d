"""Reads samples from tables: parquet files, and data sets that Hugging Face's `datasets` has saved.

A row is a sample. Its columns are the keys of a sample. An image is a text, the name of a file, or a
struct of `bytes` and `path`; a list holds several. Bytes of images are read only when they are
needed. Needs pyarrow, and not `datasets`.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_sp_jax import storage
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import content, forms, pictures, source
from llava_sp_jax.data.failure import attempt
from llava_sp_jax.data.tables import BYTES, PATH, Arrow, Parquet, Tables, arrow_files, parquet_files

TEXTS_KEPT, IMAGES_KEPT = 16, 2  # groups of rows in memory, without and with the bytes of images


class Rows(source.Samples):
  """Reads the rows of tables as samples."""

  def __init__(self, tables: Tables, path: str, image_folder: str, read: source.Reader, key: str):
    """Checks the columns.

    Args:
      tables: the tables.
      path: the data set, for messages.
      image_folder: the folder that names of images start from.
      read: makes what the model needs of an image.
      key: the setting that names `path`, for messages.

    Raises: ConfigError for tables without dialogues, or with images in another form.
    """
    super().__init__(image_folder, read)
    self._tables, self._path = tables, path
    self.far = self.far or any(map(storage.remote, tables.paths))
    first, *others = tables.schemas()
    _check(first, f"{key}: {tables.paths[0]}")
    for other, file in zip(others, tables.paths[1:], strict=True):
      if other.names != first.names:
        raise ConfigError(
          f"{key}: {file} has columns {', '.join(other.names)}, but {tables.paths[0].name} "
          f"{', '.join(first.names)}; expected the same in all files of a data set"
        )
    self._ends = list(itertools.accumulate(tables.counts))
    if not self._ends or not self._ends[-1]:
      raise ConfigError(f"{key}: {path} holds no rows")
    self._reset()

  def _reset(self) -> None:
    self._lock = threading.RLock()
    self._texts = functools.lru_cache(TEXTS_KEPT)(self._tables.texts)
    self._images = functools.lru_cache(IMAGES_KEPT)(self._tables.images)

  def __getstate__(self) -> dict[str, Any]:
    return {
      k: v for k, v in super().__getstate__().items() if k not in ("_lock", "_texts", "_images")
    }

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._reset()

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> Any:
    return attempt(lambda: self._sample(index))

  def _sample(self, index: int) -> pictures.WithPictures:
    group = bisect.bisect_right(self._ends, index)
    row = index - (self._ends[group - 1] if group else 0)
    with self._lock:  # two threads would decode the same group
      table = self._texts(group)
    values, found = {}, list[pictures.Picture]()
    for name in table.schema.names:
      cell = table.column(name)[row]
      if name in forms.IMAGES:
        paths = _paths(cell)
        names = [path or f"{name} {number}" for number, path in enumerate(paths)]
        where = (group, name, row)
        found += [self._picture(path, *where, number) for number, path in enumerate(names)]
        values[name] = names
      else:
        values[name] = source.turns(cell.as_py()) if name in forms.DIALOGUES else cell.as_py()
    return pictures.WithPictures(values, found)

  def _picture(self, name: str, *where: Any) -> pictures.Picture:
    return pictures.Stored(name, functools.partial(self._bytes, name, *where))

  def _bytes(self, name: str, group: int, column: str, row: int, number: int) -> bytes:
    with self._lock:
      images = self._images(group, column)
    cell = images[row]
    one = cell.values[number] if _is_list(cell.type) else cell
    found = one[BYTES].as_py() if _has_bytes(one.type) else None
    return found if found is not None else pictures.in_folder(self._folder, name).data()

  def fingerprint(self) -> str:
    """Returns the hash of the samples, in hexadecimal digits; the bytes of images are not read."""
    return content.of(self, self._path, self._tables.paths)


def _paths(cell: Any) -> list[str]:
  """Returns the path of each image of a cell, "" for one without."""
  if not cell.is_valid:
    return []
  ones = cell.values if _is_list(cell.type) else [cell]
  return [(one[PATH] if _has_bytes(one.type, PATH) else one).as_py() or "" for one in ones]


def _is_list(kind: Any) -> bool:
  import pyarrow

  return bool(pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind))


def _has_bytes(kind: Any, field: str = BYTES) -> bool:
  import pyarrow

  return bool(pyarrow.types.is_struct(kind)) and kind.get_field_index(field) >= 0


def _check(schema: Any, where: str) -> None:
  import pyarrow

  if not set(schema.names) & set(forms.DIALOGUES):
    raise ConfigError(
      f"{where} has columns {', '.join(schema.names)}; expected {' or '.join(forms.DIALOGUES)}, and "
      f"{' or '.join(forms.IMAGES)}"
    )
  for name in set(schema.names) & set(forms.IMAGES):
    kind = schema.field(name).type
    one = kind.value_type if _is_list(kind) else kind
    text = pyarrow.types.is_string(one) or pyarrow.types.is_large_string(one)
    if not (text or pyarrow.types.is_null(one) or (_has_bytes(one) and _has_bytes(one, PATH))):
      raise ConfigError(
        f"{where}: column {name} is {str(kind)[:80]}; expected names of files (string), or pictures "
        f"(struct<{BYTES}: binary, {PATH}: string>), or a list of one of them"
      )


def parquet(path: str, image_folder: str, read: source.Reader, key: str = "data.path") -> Rows:
  """Opens parquet files, as `Rows` does. Raises: ConfigError for files that cannot be read."""
  return _opened(Parquet, parquet_files(storage.place(path)), path, image_folder, read, key)


def arrow(path: str, image_folder: str, read: source.Reader, key: str = "data.path") -> Rows:
  """Opens a saved data set, as `Rows` does. Raises: ConfigError for one that cannot be read."""
  place = storage.place(path)
  files = arrow_files(storage.of(place).local(place), key)  # they are mapped into memory
  return _opened(Arrow, files, path, image_folder, read, key)


def _opened(
  tables: Callable[[Sequence[Path]], Tables],
  files: Sequence[Path],
  path: str,
  image_folder: str,
  read: source.Reader,
  key: str,
) -> Rows:
  import pyarrow

  if not files:
    raise ConfigError(f"{key}: {path!r:.200} has no files of samples")
  try:
    opened = tables(files)
  except (pyarrow.ArrowException, OSError) as error:
    why = str(error).splitlines()[0]
    raise ConfigError(f"{key}: {path} cannot be read ({why:.200})") from None
  return Rows(opened, path, image_folder, read, key)
