"""Reads records of an ArrayRecord file by ranges of bytes, as a file in a bucket is read.

The library of ArrayRecord reads local files only. This reads files with one record a chunk, which
`pack` writes. The file is a Riegeli file: chunks, with a header of 24 bytes at each multiple of
64 KiB. At its end stands a list of the chunks, and where that list is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llava_sp_jax import storage

BLOCK, BLOCK_HEADER, CHUNK_HEADER = 1 << 16, 24, 40
RECORDS = b"r"  # type of a chunk that holds records
KEYS = (8, 16, 24)  # of the numbers about a chunk: its place, bytes of its records, their number
MAGIC = 0x71930E704FDAE05E  # at the end of each file
TAIL = 1 << 18  # bytes at the end that are read first; they hold the list of a shard of images
AHEAD = 1 << 20  # bytes that are read at a time where records are read in their order
NEAR = 64  # records that may be left out in such an order
# Reads in such an order before more is read ahead: a shuffled one has two or three of them by chance.
STREAK = 4


class ArrayRecordError(ValueError):
  """Reports a file that is not what `pack` writes; names it."""


class ArrayRecord:
  """Reads records by their number; may be used by several threads."""

  def __init__(self, path: Path):
    """Reads the list of chunks. Raises: OSError; ArrayRecordError."""
    self._file = storage.of(path).opened(path)
    size = self._file.size
    first = max(size - TAIL, 0) // BLOCK * BLOCK
    tail = self._file.read_at(first, size - first)
    place = size - BLOCK
    try:
      _, found = _chunk(_logical(tail[place - first :], place))
      _, at, _, magic, *_ = _numbers(found).tolist()
      if magic != MAGIC:
        raise ValueError("another magic number")
      if at < first:
        tail, first = self._file.read_at(at, place - at), at
      sizes, found = _chunk(_logical(tail[at - first : place - first], at))
      about = _numbers(found[sizes[0] :]).reshape(-1, len(KEYS) * 2)  # behind that of the file
      if (about[:, ::2] != KEYS).any() or (about[:, 5] != 1).any():
        raise ValueError("several records a chunk")
    except (IndexError, ValueError) as error:
      raise ArrayRecordError(
        f"{path}: cannot be read as ArrayRecord ({error}); expected what llava-sp data pack writes"
      ) from None
    self._places = np.append(about[:, 1], np.uint64(at)).astype(np.int64)
    self._lock = threading.Lock()
    self._last, self._streak = -NEAR, 0  # the last record, and reads in order up to it
    self._held = 0, b""  # bytes that were read ahead

  def __len__(self) -> int:
    return len(self._places) - 1

  def __getitem__(self, number: int) -> bytes:
    """Returns a record. Raises: OSError; ArrayRecordError for damage."""
    start, end = self._span(number)
    return self._record(number, start, self._bytes(number, start, end))

  def begin(self, number: int) -> Callable[[], bytes]:
    """Begins to read a record, and nothing beyond it; returns what waits for it.

    Raises: OSError; what is returned: OSError, ArrayRecordError for damage.
    """
    start, end = self._span(number)
    wait = self._file.begin_at(start, end - start)
    return lambda: self._record(number, start, wait())

  def _span(self, number: int) -> tuple[int, int]:
    start, end = self._places[number : number + 2].tolist()
    return start, end

  def _record(self, number: int, start: int, found: bytes) -> bytes:
    try:
      return _chunk(_logical(found, start))[1]
    except (IndexError, ValueError) as error:
      raise ArrayRecordError(f"{self._file.path}: record {number} is damaged ({error})") from None

  def _bytes(self, number: int, start: int, end: int) -> bytes:
    with self._lock:
      begin, held = self._held
      self._streak = self._streak + 1 if 0 < number - self._last <= NEAR else 0
      self._last, in_order = number, self._streak >= STREAK
    if begin <= start and end <= begin + len(held):
      return held[start - begin : end - begin]
    found = self._file.read_at(start, max(end - start, AHEAD) if in_order else end - start)
    if in_order:
      with self._lock:
        self._held = start, found
    return found[: end - start]


def _logical(data: bytes, place: int) -> bytes:
  """Returns bytes that were read from offset `place` without the headers of blocks."""
  parts, at = [], 0
  view = memoryview(data)  # its slices are no copies
  while at < len(data):
    inside = (place + at) % BLOCK
    if inside < BLOCK_HEADER:
      at += BLOCK_HEADER - inside
      inside = BLOCK_HEADER
    parts.append(view[at : at + BLOCK - inside])
    at += BLOCK - inside
  return b"".join(parts)


def _chunk(data: bytes) -> tuple[np.ndarray, bytes]:
  """Returns the sizes of a chunk's records, and their bytes. Raises: IndexError, ValueError."""
  size = int.from_bytes(data[8:16], "little")
  count = int.from_bytes(data[25:32], "little")
  body = memoryview(data)[CHUNK_HEADER : CHUNK_HEADER + size]
  if data[24:25] != RECORDS or len(body) < size:
    raise ValueError("no chunk of records")
  kind = body[0]
  length, at = _varint(body, 1)
  found = _plain(kind, body[at : at + length])
  sizes = _numbers(found) if count > 1 else np.array([_varint(found, 0)[0]])
  values = _plain(kind, body[at + length :])
  if len(sizes) != count or int(sizes.sum()) != len(values):
    raise ValueError(f"{len(values)} bytes in {count} records")
  return sizes, bytes(values)


def _plain(kind: int, data: memoryview) -> bytes | memoryview:
  """Decompresses data: as they are (0), or of zstd, behind their size."""
  if kind == 0:
    return data
  if kind != ord("z"):
    raise ValueError(f"compressed by {chr(kind)!r}")
  import pyarrow

  size, at = _varint(data, 0)
  return bytes(pyarrow.decompress(data[at:], size, codec="zstd", asbytes=True)) if size else b""


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = data[at]
    value |= (byte & 127) << shift
    at, shift = at + 1, shift + 7
    if byte < 128:
      return value, at


def _numbers(data: bytes | memoryview) -> np.ndarray:
  """Returns all numbers of a sequence of them, as uint64."""
  raw = np.frombuffer(data, np.uint8)
  last = np.flatnonzero(raw < 128)
  if not len(last) or last[-1] != len(raw) - 1:
    raise ValueError("a number is cut off")
  starts = np.append(0, last[:-1] + 1)
  shifts = 7 * (np.arange(len(raw)) - np.repeat(starts, last - starts + 1))
  return np.add.reduceat((raw & 127).astype(np.uint64) << shifts.astype(np.uint64), starts)
