"""Reads the files of `torch.save`: a zip of a pickle that names tensors, and their bytes.

Source: torch/serialization.py (the zip format, since torch 1.6).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llava_sp_jax.convert import torch_pickle, torch_zip
from llava_sp_jax.convert.tensor import (
  MAX_TENSORS,
  DataFile,
  MalformedError,
  Tensor,
  Tensors,
  check_name,
  check_total,
)
from llava_sp_jax.convert.torch_pickle import STORAGES, Storage, TensorView
from llava_sp_jax.files import FormatError

__all__ = ["STORAGES", "open_bin"]

_OLD = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the beginning of the older format
BYTE_ORDERS = {b"little": False, b"big": True}


def open_bin(path: Path) -> Tensors:
  """Returns the tensors of a `torch.save` file by name; each is mapped when it is read.

  The checksum of a tensor's bytes is compared when it is first read, that of the pickle at once.

  Raises: FormatError when the file is damaged, or holds anything but tensors by name.
  """
  file = DataFile.open(path)
  try:
    return _Archive(file).tensors()
  except MalformedError as error:
    raise FormatError(f"{path}: cannot be read as a torch checkpoint: {error}") from None


class _Archive:
  """Holds an opened file: its members, the order of bytes, and the content of its pickle."""

  def __init__(self, file: DataFile):
    self.file = file
    if file.read(0, min(file.size, len(_OLD))) == _OLD:
      raise MalformedError(
        "its format is older than torch 1.6; load and save it with a newer torch"
      )
    self.members = torch_zip.members(file)
    pickles = [name for name in self.members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(pickles) != 1:
      raise MalformedError("not a torch checkpoint (no data.pkl inside)")
    self.folder = pickles[0].removesuffix("data.pkl")
    self.big_endian = self._big_endian()
    data = torch_zip.read(file, self.members[pickles[0]], torch_pickle.MAX_BYTES)
    self.tree = torch_pickle.load(data)
    self.maps: dict[str, Callable[[], np.ndarray]] = {}

  def _big_endian(self) -> bool:
    member = self.members.get(f"{self.folder}byteorder")
    if member is None:  # written before torch 2.1
      return False
    said = torch_zip.read(self.file, member, 16)
    if said not in BYTE_ORDERS:
      raise MalformedError(f"byteorder says {said!a}, expected 'little' or 'big'")
    return BYTE_ORDERS[said]

  def tensors(self) -> Tensors:
    if not isinstance(self.tree, dict) or len(self.tree) > MAX_TENSORS:
      raise MalformedError(f"expected a dictionary of tensors, at most {MAX_TENSORS:,}")
    result: Tensors = {}
    for key, view in self.tree.items():
      name = check_name(key)
      if not isinstance(view, TensorView):
        raise MalformedError(f"expected a dictionary of tensors, found something else under {name}")
      result[name] = self._tensor(name, view)
    check_total(result.values(), self.file.size)
    return result

  def _tensor(self, name: str, view: TensorView) -> Tensor:
    storage = view.storage
    values = self.maps.setdefault(storage.key, self._map(storage))
    item = storage.dtype.itemsize

    def array() -> np.ndarray:
      if 0 in view.shape:
        return np.zeros(view.shape, storage.dtype)
      return np.lib.stride_tricks.as_strided(
        values()[view.offset :], view.shape, [s * item for s in view.strides], writeable=False
      )

    return Tensor(name, str(self.file.path), view.shape, storage.dtype, array)

  def _map(self, storage: Storage) -> Callable[[], np.ndarray]:
    """Returns a function that maps a storage.

    Its size is compared now, its checksum when it is mapped.
    """
    member = self.members.get(f"{self.folder}data/{storage.key}")
    if member is None:
      raise MalformedError(f"no storage {storage.key[:80]!a} inside")
    if member.size != storage.count * storage.dtype.itemsize:
      raise MalformedError(f"storage {storage.key[:80]!a} is truncated, or larger than it says")
    check = torch_zip.checker(self.file, member)

    def values() -> np.ndarray:
      try:
        check()
      except MalformedError as error:
        raise FormatError(f"{self.file.path}: {error}") from None
      return self.file.map(storage.dtype, member.start, storage.count, self.big_endian)

    return values
