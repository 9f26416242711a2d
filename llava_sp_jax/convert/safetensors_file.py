"""Reads safetensors files: a JSON header that gives the place of each tensor in the file.

The tensors must cover every byte after the header, without gaps and overlaps.
Source: the format's description in the repository huggingface/safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax import json_files
from llava_sp_jax.convert.tensor import (
  BFLOAT16,
  MAX_TENSORS,
  DataFile,
  MalformedError,
  Tensor,
  Tensors,
  check_name,
  check_shape,
)
from llava_sp_jax.files import FormatError

DTYPES = {
  "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
  "BF16": BFLOAT16, "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
  "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
_LENGTH = 8  # bytes before the header that give its length


def open_safetensors(path: Path) -> Tensors:
  """Returns the tensors of a safetensors file by name; each is mapped when it is read.

  Raises: FormatError when the file is damaged or has changed.
  """
  file = DataFile.open(path)
  try:
    return _tensors(file)
  except MalformedError as error:
    raise FormatError(f"{path}: cannot be read as safetensors: {error}") from None


def _tensors(file: DataFile) -> Tensors:
  length = int.from_bytes(file.read(0, _LENGTH), "little")
  start = _LENGTH + length
  if start > file.size or length > json_files.MAX_BYTES:
    raise MalformedError(f"a header of {length:,} bytes in a file of {file.size:,}")
  header = json_files.parse_object(file.read(_LENGTH, length), f"{file.path}: header")
  about = header.pop("__metadata__", {})
  if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
    raise MalformedError("__metadata__ is no object of texts")
  if len(header) > MAX_TENSORS:
    raise MalformedError(f"{len(header):,} tensors, expected at most {MAX_TENSORS:,}")
  places = {check_name(name): _place(name, entry) for name, entry in header.items()}
  end = 0
  for name, (_, _, begin, after) in sorted(places.items(), key=lambda item: item[1][2:]):
    if begin != end:
      raise MalformedError(
        f"{name} begins at byte {begin:,}, but the tensors before it end at {end:,}"
      )
    end = after
  if start + end != file.size:
    raise MalformedError(f"its tensors need {start + end:,} bytes, but the file has {file.size:,}")
  return {
    name: _tensor(file, name, shape, dtype, start + begin)
    for name, (shape, dtype, begin, _) in places.items()
  }


def _tensor(
  file: DataFile, name: str, shape: tuple[int, ...], dtype: np.dtype, start: int
) -> Tensor:
  count = int(np.prod(shape, dtype=object))

  def array() -> np.ndarray:
    return file.map(dtype, start, count).reshape(shape)

  return Tensor(name, str(file.path), shape, dtype, array)


def _place(name: str, entry: Any) -> tuple[tuple[int, ...], np.dtype, int, int]:
  """Returns shape, dtype, and the byte range after the header. Raises: MalformedError."""
  if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
    raise MalformedError(f"{name} is not described by dtype, shape and data_offsets")
  kind, sizes, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
  if not isinstance(kind, str) or kind not in DTYPES:
    raise MalformedError(f"{name} has dtype {kind!a:.40}; known: {', '.join(DTYPES)}")
  if not isinstance(sizes, list) or not isinstance(offsets, list) or len(offsets) != 2:
    raise MalformedError(f"{name} has no list of sizes, or no two offsets")
  dtype = DTYPES[kind]
  shape = check_shape(sizes, dtype.itemsize)
  begin, end = check_shape(offsets, 1)
  size = int(np.prod(shape, dtype=object)) * dtype.itemsize
  if end - begin != size:
    raise MalformedError(f"{name} has {end - begin:,} bytes, but its shape and dtype need {size:,}")
  return shape, dtype, begin, end
