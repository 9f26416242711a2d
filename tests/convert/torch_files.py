"""Writes files of `torch.save` by hand, byte for byte as an attack needs them; no torch."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

SIX = np.arange(6, dtype=np.float32)


def text(value: str) -> bytes:
  data = value.encode()
  return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
  data = pickle.encode_long(value)
  return pickle.LONG1 + bytes([len(data)]) + data


def real(value: float) -> bytes:
  return pickle.BINFLOAT + struct.pack(">d", value)


def numbers(*values: int) -> bytes:
  return pickle.MARK + b"".join(map(number, values)) + pickle.TUPLE


def name(module: str, attribute: str) -> bytes:
  return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def put(index: int) -> bytes:
  return pickle.BINPUT + bytes([index])


def get(index: int) -> bytes:
  return pickle.BINGET + bytes([index])


HOOKS = name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE


def storage(
  kind: str = "FloatStorage",
  key: bytes = text("0"),
  count: bytes = number(6),
  tag: bytes = text("storage"),
) -> bytes:
  about = tag + name("torch", kind) + key + text("cpu") + count
  return pickle.MARK + about + pickle.TUPLE + pickle.BINPERSID


def tensor(
  size: bytes = numbers(2, 3),
  stride: bytes = numbers(3, 1),
  offset: bytes = number(0),
  stored: bytes = storage(),
  rest: bytes = pickle.NEWFALSE + HOOKS,
) -> bytes:
  """A call of torch's `_rebuild_tensor_v2`."""
  arguments = stored + offset + size + stride + rest
  call = name("torch._utils", "_rebuild_tensor_v2")
  return call + pickle.MARK + arguments + pickle.TUPLE + pickle.REDUCE


def dictionary(*items: bytes, then: bytes = b"") -> bytes:
  """A whole pickle: keys and values in turn, and what comes between them and its end."""
  held = pickle.EMPTY_DICT + pickle.MARK + b"".join(items) + pickle.SETITEMS
  return pickle.PROTO + b"\2" + held + then + pickle.STOP


GOOD = dictionary(text("a"), tensor())


def save(
  path: Path,
  pickled: bytes = GOOD,
  stored: bytes = SIX.tobytes(),
  byteorder: str = "",
  compression: int = zipfile.ZIP_STORED,
) -> Path:
  """A file as `torch.save` lays it out, with one storage."""
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", pickled)
    archive.writestr("archive/data/0", stored)
    if byteorder:
      archive.writestr("archive/byteorder", byteorder)
  return path
