"""Opens torch checkpoints without torch: `.bin` (zip of a pickle) and safetensors, one or sharded.

Opening reads names, shapes and dtypes; the values of a tensor are mapped or read when `array()` is
called, so a checkpoint may be larger than the memory.

A pickle can run any code it likes. This reader builds tensors and plain containers and refuses
every other name, so a hostile file gives an error and nothing else.
Source: the zip format of `torch.save` (torch/serialization.py).
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


class FormatError(ValueError):
  """A checkpoint file that cannot be used; names the file and what was expected."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A named array in a file; `array()` gives its values, mapped from the file where possible."""

  name: str
  origin: str  # the file, for messages
  shape: tuple[int, ...]
  dtype: np.dtype
  array: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def renamed(self, name: str) -> Tensor:
    return dataclasses.replace(self, name=name)


Tensors = dict[str, Tensor]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# ---- torch.save -----------------------------------------------------------------------------------

STORAGES = {
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": BFLOAT16,
  "DoubleStorage": np.dtype(np.float64),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}


class _Sealed:
  """What a pickle may hold but not change: the BUILD opcode ends in `__setstate__`."""

  __slots__ = ()

  def __setstate__(self, state: Any) -> None:
    raise pickle.UnpicklingError("tries to change the state of an object: only tensors are read")


class _Storage(_Sealed):
  """A flat array of the file: where it starts and how many items it has."""

  __slots__ = ("count", "dtype", "path", "start")

  def __init__(self, path: Path, start: int, dtype: np.dtype, count: int):
    self.path, self.start, self.dtype, self.count = path, start, dtype, count

  def map(self) -> np.ndarray:
    if not self.count:
      return np.zeros(0, self.dtype)
    return np.memmap(self.path, self.dtype, "r", self.start, (self.count,))


class _View(_Sealed):
  """A strided window into a storage."""

  __slots__ = ("offset", "size", "storage", "stride")

  def __init__(self, storage: Any, offset: int, size: tuple, stride: tuple):
    if not isinstance(storage, _Storage):
      raise pickle.UnpicklingError("a tensor without a storage")
    self.storage, self.offset, self.size, self.stride = storage, offset, size, stride
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    inside = 0 in size or last < storage.count
    if not inside or offset < 0 or min((*size, 0)) < 0 or min((*stride, 0)) < 0:
      raise pickle.UnpicklingError("a tensor reaches beyond its storage")

  def array(self) -> np.ndarray:
    item = self.storage.dtype.itemsize
    return np.lib.stride_tricks.as_strided(
      self.storage.map()[self.offset :], self.size, [s * item for s in self.stride],
      writeable=False,
    )  # fmt: skip


class _StorageType(_Sealed):
  __slots__ = ("dtype",)

  def __init__(self, dtype: np.dtype):
    self.dtype = dtype


class _Rebuild(_Sealed):
  """torch's functions that put a tensor together: the first arguments decide."""

  __slots__ = ("build",)

  def __init__(self, build: Callable[..., Any]):
    self.build = build

  def __call__(self, *arguments: Any) -> Any:
    return self.build(*arguments)


ALLOWED: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): collections.OrderedDict,
  ("torch._utils", "_rebuild_tensor_v2"): _Rebuild(lambda *a: _View(*a[:4])),
  ("torch._utils", "_rebuild_parameter"): _Rebuild(lambda *a: a[0]),
  **{("torch", name): _StorageType(dtype) for name, dtype in STORAGES.items()},
}


class _TensorUnpickler(pickle.Unpickler):
  """Knows tensors and nothing else."""

  def __init__(self, file: Any, archive: zipfile.ZipFile, path: Path, prefix: str):
    super().__init__(file)
    self._archive, self._path, self._prefix = archive, path, prefix

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in ALLOWED:
      raise pickle.UnpicklingError(f"refuses {module}.{name}: only tensors are read")
    return ALLOWED[module, name]

  def persistent_load(self, pid: Any) -> _Storage:
    kind, storage_type, key, _, count = pid
    if kind != "storage" or not isinstance(storage_type, _StorageType):
      raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
    start, size = _stored(self._archive, self._path, f"{self._prefix}data/{key}")
    if not 0 <= count * storage_type.dtype.itemsize <= size:
      raise pickle.UnpicklingError(f"storage {key} is truncated")
    return _Storage(self._path, start, storage_type.dtype, count)


def _stored(archive: zipfile.ZipFile, path: Path, name: str) -> tuple[int, int]:
  """Where an uncompressed member's bytes start in the file, and how many there are."""
  info = archive.getinfo(name)
  if info.compress_type != zipfile.ZIP_STORED:
    raise pickle.UnpicklingError(f"{name} is compressed; torch.save stores it as it is")
  with path.open("rb") as file:
    file.seek(info.header_offset)
    header = file.read(30)  # the local header: two lengths at its end, then name and extra field
    if len(header) < 30:
      raise pickle.UnpicklingError(f"{name} is truncated")
    start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
  if start + info.file_size > path.stat().st_size:
    raise pickle.UnpicklingError(f"{name} is truncated")
  return start, info.file_size


def open_bin(path: Path) -> Tensors:
  """The tensors of a `torch.save` file. Raises: FormatError."""
  try:
    with zipfile.ZipFile(path) as archive:
      inner = [n for n in archive.namelist() if n.endswith("data.pkl")]
      if len(inner) != 1:
        raise FormatError(f"{path}: not a torch checkpoint (no data.pkl inside)")
      with archive.open(inner[0]) as file:
        prefix = inner[0].removesuffix("data.pkl")
        tree = _TensorUnpickler(file, archive, path, prefix).load()
  except FormatError:
    raise
  except Exception as error:  # a broken pickle may raise anything (the module's documentation)
    raise FormatError(f"{path}: cannot be read as a torch checkpoint: {error}") from None
  if not isinstance(tree, Mapping) or not all(isinstance(v, _View) for v in tree.values()):
    raise FormatError(f"{path}: expected a dictionary of tensors")
  return {
    str(name): Tensor(str(name), str(path), tuple(view.size), view.storage.dtype, view.array)
    for name, view in tree.items()
  }


# ---- safetensors ----------------------------------------------------------------------------------

PIECE_BYTES = 1 << 25
SAFETENSORS_DTYPES = {
  "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
  "BF16": BFLOAT16, "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
  "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip


def open_safetensors(path: Path) -> Tensors:
  """The tensors of a safetensors file. Raises: FormatError."""
  import safetensors

  try:
    handle = safetensors.safe_open(path, framework="numpy")
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise FormatError(f"{path}: cannot be read as safetensors: {error}") from None
  tensors = {}
  for name in handle.keys():  # noqa: SIM118 - not a dictionary
    part = handle.get_slice(name)
    kind = part.get_dtype()
    if kind not in SAFETENSORS_DTYPES:
      known = ", ".join(SAFETENSORS_DTYPES)
      raise FormatError(f"{path}: {name} has dtype {kind}; known: {known}")

    def read(name: str = name) -> np.ndarray:
      return _read_safetensors(path, name)

    shape = tuple(part.get_shape())
    tensors[name] = Tensor(name, str(path), shape, SAFETENSORS_DTYPES[kind], read)
  return tensors


def _read_safetensors(path: Path, name: str) -> np.ndarray:
  """One tensor, in pieces: the library holds several copies of what it is asked for at once.

  The file is opened anew, since pages of an open one stay in memory until the last tensor is read.
  """
  import safetensors

  with safetensors.safe_open(path, framework="numpy") as file:
    part = file.get_slice(name)
    shape, dtype = part.get_shape(), SAFETENSORS_DTYPES[part.get_dtype()]
    size = math.prod(shape) * dtype.itemsize
    if size <= PIECE_BYTES or not shape[0]:
      return file.get_tensor(name)
    values = np.empty(shape, dtype)
    step = max(1, PIECE_BYTES * shape[0] // size)
    for i in range(0, shape[0], step):
      values[i : i + step] = part[i : min(i + step, shape[0])]
  return values


# ---- files and folders ----------------------------------------------------------------------------

OPENERS: dict[str, Callable[[Path], Tensors]] = {
  ".safetensors": open_safetensors,
  ".bin": open_bin,
}
WEIGHTS = ("model", "pytorch_model")  # file stems of a Hugging Face model folder


def open_file(path: Path) -> Tensors:
  """The tensors of one file, by its ending. Raises: FormatError."""
  if not path.is_file():
    raise FormatError(f"{path}: no such file")
  if path.suffix not in OPENERS:
    raise FormatError(f"{path}: expected a file that ends with {' or '.join(OPENERS)}")
  return OPENERS[path.suffix](path)


def find(folder: Path, stems: tuple[str, ...]) -> Path | None:
  """The first of `stem.ending` and `stem.ending.index.json` that a folder has."""
  for stem in stems:
    for suffix in OPENERS:
      for name in (f"{stem}{suffix}.index.json", f"{stem}{suffix}"):
        if (folder / name).is_file():
          return folder / name
  return None


def open_named(folder: Path, stems: tuple[str, ...]) -> Tensors:
  """Tensors of the first of `stems` in a folder: one file, or shards by their index.

  Raises: FormatError that lists what was looked for.
  """
  path = find(folder, stems)
  if path is None:
    wanted = ", ".join(f"{stem}{suffix}" for stem in stems for suffix in OPENERS)
    raise FormatError(f"{folder}: no weights here; looked for {wanted} and their .index.json")
  return _open_shards(path) if path.name.endswith(".index.json") else open_file(path)


def _open_shards(index: Path) -> Tensors:
  try:
    names = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(names.values()))
  except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
    raise FormatError(f"{index}: expected JSON with a `weight_map`: {error!r}") from None
  outside = [s for s in shards if Path(s).name != s]
  absent = [s for s in shards if s not in outside and not (index.parent / s).is_file()]
  if outside or absent:
    kind, files = ("outside its folder", outside) if outside else ("that are not there", absent)
    raise FormatError(f"{index}: names files {kind}: {', '.join(files)}")
  tensors: Tensors = {}
  for shard in shards:
    tensors.update(open_file(index.parent / shard))
  missing = sorted(set(names) - set(tensors))
  if missing:
    raise FormatError(f"{index}: named but in no shard: {', '.join(missing)}")
  return tensors
