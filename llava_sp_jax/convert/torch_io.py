"""Reads torch checkpoints without torch: `.bin` (zip of a pickle) and safetensors, one or sharded.

A pickle can run any code it likes. This reader builds tensors and plain containers and refuses
every other name, so a hostile file gives an error and nothing else.
Source: the zip format of `torch.save` (torch/serialization.py).
"""

from __future__ import annotations

import collections
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np


class FormatError(ValueError):
  """A checkpoint file that cannot be read; names the file and what was expected."""


STORAGES = {
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "DoubleStorage": np.dtype(np.float64),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}


def _tensor(storage: np.ndarray, offset: int, size: tuple, stride: tuple, *_: Any) -> np.ndarray:
  item = storage.dtype.itemsize
  last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
  if offset < 0 or min((*stride, 0)) < 0 or (0 not in size and last >= storage.size):
    raise pickle.UnpicklingError("a tensor reaches beyond its storage")
  view = np.lib.stride_tricks.as_strided(
    storage[offset:], size, [s * item for s in stride], writeable=False
  )
  return np.ascontiguousarray(view)


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
  return data


ALLOWED: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): collections.OrderedDict,
  ("torch._utils", "_rebuild_tensor_v2"): _tensor,
  ("torch._utils", "_rebuild_parameter"): _parameter,
  **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


class _TensorUnpickler(pickle.Unpickler):
  """Knows tensors and nothing else."""

  def __init__(self, file: Any, archive: zipfile.ZipFile, prefix: str):
    super().__init__(file)
    self._archive, self._prefix = archive, prefix
    self._storages: dict[str, np.ndarray] = {}

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in ALLOWED:
      raise pickle.UnpicklingError(f"refuses {module}.{name}: only tensors are read")
    return ALLOWED[module, name]

  def persistent_load(self, pid: Any) -> np.ndarray:
    kind, dtype, key, _, count = pid
    if kind != "storage":
      raise pickle.UnpicklingError(f"unknown persistent object {kind!r}")
    if key not in self._storages:
      data = self._archive.read(f"{self._prefix}data/{key}")
      if len(data) < count * dtype.itemsize:
        raise pickle.UnpicklingError(f"storage {key} is truncated")
      self._storages[key] = np.frombuffer(data, dtype, count)
    return self._storages[key]


def read_bin(path: Path) -> dict[str, np.ndarray]:
  """All tensors of a `torch.save` file. Raises: FormatError."""
  try:
    with zipfile.ZipFile(path) as archive:
      inner = [n for n in archive.namelist() if n.endswith("data.pkl")]
      if len(inner) != 1:
        raise FormatError(f"{path}: not a torch checkpoint (no data.pkl inside)")
      with archive.open(inner[0]) as file:
        tree = _TensorUnpickler(file, archive, inner[0].removesuffix("data.pkl")).load()
  except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, KeyError, AttributeError) as error:
    raise FormatError(f"{path}: cannot be read as a torch checkpoint: {error}") from None
  if not isinstance(tree, Mapping) or not all(isinstance(v, np.ndarray) for v in tree.values()):
    raise FormatError(f"{path}: expected a dictionary of tensors")
  return dict(tree)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
  """All tensors of a safetensors file. Raises: FormatError."""
  import safetensors.numpy

  try:
    return safetensors.numpy.load_file(path)
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise FormatError(f"{path}: cannot be read as safetensors: {error}") from None


READERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
  ".bin": read_bin,
  ".safetensors": read_safetensors,
}


def read(path: Path) -> dict[str, np.ndarray]:
  """All tensors of one file, by its ending. Raises: FormatError."""
  if not path.is_file():
    raise FormatError(f"{path}: no such file")
  if path.suffix not in READERS:
    raise FormatError(f"{path}: expected a file that ends with {' or '.join(READERS)}")
  return READERS[path.suffix](path)


def read_named(folder: Path, stems: tuple[str, ...]) -> dict[str, np.ndarray]:
  """Tensors of the first of `stems` in a folder: `stem.bin`, or shards by `stem.bin.index.json`.

  Raises: FormatError that lists what was looked for.
  """
  for stem in stems:
    for suffix in READERS:
      index = folder / f"{stem}{suffix}.index.json"
      if index.is_file():
        return _read_shards(index)
      if (folder / f"{stem}{suffix}").is_file():
        return read(folder / f"{stem}{suffix}")
  wanted = ", ".join(f"{stem}{suffix}" for stem in stems for suffix in READERS)
  raise FormatError(f"{folder}: no weights here; looked for {wanted} and their .index.json")


def _read_shards(index: Path) -> dict[str, np.ndarray]:
  names = json.loads(index.read_text())["weight_map"]
  tensors: dict[str, np.ndarray] = {}
  for shard in sorted(set(names.values())):
    tensors.update(read(index.parent / shard))
  missing = sorted(set(names) - set(tensors))
  if missing:
    raise FormatError(f"{index}: named but in no shard: {', '.join(missing)}")
  return tensors


WEIGHTS = ("model", "pytorch_model")  # file stems of a Hugging Face model folder
