"""Writes torch checkpoints without torch: `torch.save` files and sharded safetensors, streamed.

Source: the zip format of `torch.save` (torch/serialization.py), which `torch_bin` reads.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from llava_sp_jax.convert.torch_io import STORAGES, Tensor

SHARD_BYTES = 2 * 1024**3  # of one safetensors file, which an export holds in memory


def save_bin(tensors: Iterable[Tensor], path: Path) -> None:
  """Writes a file for `torch.load`: a dictionary of contiguous tensors by name."""
  kinds = {dtype: name for name, dtype in STORAGES.items()}
  listed = list(tensors)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
    archive.writestr("archive/data.pkl", _pickled(listed, kinds))
    archive.writestr("archive/byteorder", "little")
    for i, tensor in enumerate(listed):
      with archive.open(f"archive/data/{i}", "w", force_zip64=True) as file:
        file.write(np.ascontiguousarray(tensor.array()).reshape(-1).view(np.uint8).data)
    archive.writestr("archive/version", "3\n")


def _pickled(tensors: list[Tensor], kinds: dict[np.dtype, str]) -> bytes:
  """Returns the pickle of `{name: tensor}`, protocol 2, which only names torch's classes."""
  out = io.BytesIO()

  def put(*parts: bytes) -> None:
    out.write(b"".join(parts))

  def text(value: str) -> bytes:
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data

  def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data

  def numbers(values: Iterable[int]) -> bytes:
    return pickle.MARK + b"".join(map(number, values)) + pickle.TUPLE

  def name(module: str, attribute: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

  put(pickle.PROTO, b"\x02", pickle.EMPTY_DICT, pickle.MARK)
  for i, tensor in enumerate(tensors):
    count = int(np.prod(tensor.shape))
    strides = [int(np.prod(tensor.shape[axis + 1 :])) for axis in range(len(tensor.shape))]
    put(text(tensor.name), name("torch._utils", "_rebuild_tensor_v2"), pickle.MARK)
    storage = (
      text("storage"),
      name("torch", kinds[tensor.dtype]),
      text(str(i)),
      text("cpu"),
      number(count),
    )
    put(pickle.MARK, *storage, pickle.TUPLE, pickle.BINPERSID)
    put(number(0), numbers(tensor.shape), numbers(strides), pickle.NEWFALSE)
    put(name("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE)
    put(pickle.TUPLE, pickle.REDUCE)
  put(pickle.SETITEMS, pickle.STOP)
  return out.getvalue()


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
