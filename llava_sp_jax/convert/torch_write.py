"""Writes torch checkpoints without torch: `torch.save` files and sharded safetensors, streamed.

Source: the zip format of `torch.save` (torch/serialization.py), which `torch_bin` reads.
"""

from __future__ import annotations

import functools
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from llava_sp_jax.convert.torch_io import STORAGES, Tensor

SHARD_BYTES = 2 * 1024**3  # of one safetensors file, which an export holds in memory
_KINDS = {dtype: name for name, dtype in STORAGES.items()}


def save_bin(tensors: Iterable[Tensor], path: Path) -> None:
  """Writes a file for `torch.load`: a dictionary of contiguous tensors by name."""
  listed = list(tensors)
  items = [_text(t.name) + _tensor(i, t.shape, t.dtype) for i, t in enumerate(listed)]
  body = pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS
  with path.open("wb") as file:
    _save(file, body, [t.array for t in listed])


def save_value(value: np.ndarray | Sequence[np.ndarray], file: BinaryIO) -> None:
  """Writes what `torch.load` returns as one contiguous tensor, or as a list of tensors."""
  arrays = [value] if isinstance(value, np.ndarray) else list(value)
  items = b"".join(_tensor(i, array.shape, array.dtype) for i, array in enumerate(arrays))
  listed = pickle.EMPTY_LIST + pickle.MARK + items + pickle.APPENDS
  body = items if isinstance(value, np.ndarray) else listed
  _save(file, body, [functools.partial(np.asarray, array) for array in arrays])


def _save(file: BinaryIO, body: bytes, arrays: Sequence[Callable[[], np.ndarray]]) -> None:
  """Writes a pickle of tensors, protocol 2, which only names torch's classes, and their values."""
  with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
    archive.writestr("archive/data.pkl", pickle.PROTO + b"\x02" + body + pickle.STOP)
    archive.writestr("archive/byteorder", "little")
    for i, array in enumerate(arrays):
      with archive.open(f"archive/data/{i}", "w", force_zip64=True) as place:
        place.write(np.ascontiguousarray(array()).reshape(-1).view(np.uint8).data)
    archive.writestr("archive/version", "3\n")


def _tensor(number: int, shape: tuple[int, ...], dtype: np.dtype) -> bytes:
  """Returns the part of a pickle that makes a contiguous tensor of the storage `number`."""
  strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
  storage = (
    _text("storage"),
    _name("torch", _KINDS[dtype]),
    _text(str(number)),
    _text("cpu"),
    _number(int(np.prod(shape))),
  )
  return b"".join(
    (
      _name("torch._utils", "_rebuild_tensor_v2"), pickle.MARK,
      pickle.MARK, *storage, pickle.TUPLE, pickle.BINPERSID,
      _number(0), _numbers(shape), _numbers(strides), pickle.NEWFALSE,
      _name("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE,
      pickle.TUPLE, pickle.REDUCE,
    )
  )  # fmt: skip


def _text(value: str) -> bytes:
  data = value.encode()
  return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
  data = pickle.encode_long(value)
  return pickle.LONG1 + bytes([len(data)]) + data


def _numbers(values: Iterable[int]) -> bytes:
  return pickle.MARK + b"".join(map(_number, values)) + pickle.TUPLE


def _name(module: str, attribute: str) -> bytes:
  return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def save_safetensors(
  tensors: Iterable[Tensor], folder: Path, stem: str = "model", shard_bytes: int = SHARD_BYTES
) -> None:
  """Writes `stem.safetensors`, or numbered shards with their index, as transformers does.

  A shard has at most `shard_bytes` bytes, unless a single tensor is larger.
  """
  import safetensors.numpy

  shards = list(_shards(tensors, shard_bytes))
  names = [f"{stem}.safetensors"]
  if len(shards) > 1:
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
  for name, shard in zip(names, shards, strict=True):
    arrays = {t.name: np.ascontiguousarray(t.array()) for t in shard}
    safetensors.numpy.save_file(arrays, folder / name, metadata={"format": "pt"})
    del arrays
  if len(shards) > 1:
    where = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
    total = sum(t.nbytes for shard in shards for t in shard)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shards(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
  shard: list[Tensor] = []
  size = 0
  for tensor in tensors:
    if shard and size + tensor.nbytes > limit:
      yield shard
      shard, size = [], 0
    shard.append(tensor)
    size += tensor.nbytes
  if shard:
    yield shard
