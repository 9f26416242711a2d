"""Reads the zip archive of `torch.save`: uncompressed members one after another, with checksums.

No more of the zip format is supported. Compressed, encrypted, overlapping and repeated members are
refused, so no archive stands for more bytes than its file has.
Source: APPNOTE.TXT of PKWARE, 4.3 (records) and 4.5.3 (zip64).
"""

from __future__ import annotations

import dataclasses
import functools
import struct
import zlib
from collections.abc import Callable

from llava_sp_jax import files
from llava_sp_jax.convert.tensor import MAX_TENSORS, DataFile, MalformedError

MAX_MEMBERS = MAX_TENSORS + 64  # tensors, and the other members that torch writes
MAX_DIRECTORY = 16 << 20  # bytes

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_IN_ZIP64 = 0xFFFFFFFF


@dataclasses.dataclass(frozen=True)
class Member:
  """Holds the place of a member in the file, and its CRC-32; None if none was written."""

  name: str
  start: int
  size: int
  crc: int | None


def members(file: DataFile) -> dict[str, Member]:
  """Returns the place of every member of the archive, by name.

  Raises: MalformedError for a file that is damaged, or no archive as torch writes it.
  """
  count, size, start, after = _directory(file)
  if count > MAX_MEMBERS or size > MAX_DIRECTORY:
    raise MalformedError(
      f"{count:,} members in a directory of {size:,} bytes, more than any checkpoint"
    )
  if start + size != after:
    raise MalformedError("its zip directory does not end where its end record begins")
  entries = list(_entries(file.read(start, size), count))
  checked = any(crc for _, crc, _, _ in entries)  # torch can omit them; then all are 0
  found: dict[str, Member] = {}
  end = 0
  with files.open_regular(file.path) as opened:
    for raw, crc, length, place in sorted(entries, key=lambda entry: entry[3]):
      name = raw.decode("utf-8", "backslashreplace")
      beside = place < end or place > start
      header = b"" if beside else files.read_at(opened, file.path, place, _LOCAL.size + len(raw))
      if len(header) < _LOCAL.size + len(raw):
        raise MalformedError(f"member {_shown(name)} overlaps another or is truncated")
      magic, *_, name_length, extra_length = _LOCAL.unpack(header[: _LOCAL.size])
      if magic != b"PK\3\4" or header[_LOCAL.size :] != raw or name_length != len(raw):
        raise MalformedError(f"member {_shown(name)} is not where the zip directory says")
      begin = place + _LOCAL.size + name_length + extra_length
      end = begin + length
      if end > start:
        raise MalformedError(f"member {_shown(name)} is truncated")
      if name in found:
        raise MalformedError(f"two members are {_shown(name)}")
      found[name] = Member(name, begin, length, crc if checked else None)
  return found


def read(file: DataFile, member: Member, limit: int) -> bytes:
  """Returns the bytes of a small member.

  Raises: MalformedError when it is larger than `limit`, or its checksum differs.
  """
  if member.size > limit:
    raise MalformedError(
      f"{_shown(member.name)} has {member.size:,} bytes, expected at most {limit:,}"
    )
  data = file.read(member.start, member.size)
  if member.crc not in (None, zlib.crc32(data)):
    raise MalformedError(_damaged(member))
  return data


def checker(file: DataFile, member: Member) -> Callable[[], None]:
  """Returns a function that compares the checksum of a large member on its first call.

  That function raises MalformedError when it differs.
  """

  @functools.cache
  def check() -> None:
    if member.crc is None:
      return
    crc, step = 0, 1 << 20
    for start in range(member.start, member.start + member.size, step):
      crc = zlib.crc32(file.read(start, min(step, member.start + member.size - start)), crc)
    if crc != member.crc:
      raise MalformedError(_damaged(member))

  return check


def _directory(file: DataFile) -> tuple[int, int, int, int]:
  """Returns entries, bytes and start of the zip directory, and the start of the next record."""
  tail_at = max(0, file.size - _END.size - 0xFFFF)
  tail = file.read(tail_at, file.size - tail_at)
  at = tail.rfind(b"PK\5\6")
  if at < 0 or len(tail) - at < _END.size:
    raise MalformedError("no zip archive, or its end is missing")
  _, disk, other, here, count, size, start, comment = _END.unpack_from(tail, at)
  if at + _END.size + comment != len(tail):
    raise MalformedError("bytes behind the end of its zip archive")
  at += tail_at
  if at >= _LOCATOR.size:
    magic, _, place, _ = _LOCATOR.unpack(file.read(at - _LOCATOR.size, _LOCATOR.size))
    if magic == b"PK\6\7":
      record = _END64.unpack(file.read(place, _END64.size))
      if record[0] != b"PK\6\6" or place + _END64.size != at - _LOCATOR.size:
        raise MalformedError("its zip64 end record is damaged")
      disk, other, here, count, size, start = record[4:]
      at = place
  if disk or other or here != count:
    raise MalformedError("a zip archive in several parts")
  return count, size, start, at


def _entries(data: bytes, count: int) -> list[tuple[bytes, int, int, int]]:
  """Returns (name, CRC, bytes, start of the local header) of each entry.

  Raises: MalformedError.
  """
  found, at = [], 0
  for _ in range(count):
    if at + _ENTRY.size > len(data):
      raise MalformedError("its zip directory is truncated")
    entry = _ENTRY.unpack_from(data, at)
    magic, flags, method, crc, packed, size = entry[0], entry[3], entry[4], *entry[7:10]
    name_length, extra_length, comment = entry[10:13]
    place = entry[16]
    at += _ENTRY.size
    name = data[at : at + name_length]
    extra = data[at + name_length : at + name_length + extra_length]
    at += name_length + extra_length + comment
    if magic != b"PK\1\2" or at > len(data):
      raise MalformedError("its zip directory is damaged")
    size, packed, place = _wide(extra, size, packed, place)
    if flags & 1 or method:
      shown = _shown(name.decode("utf-8", "backslashreplace"))
      raise MalformedError(f"{shown} is compressed or encrypted; torch.save stores it as it is")
    if size != packed:
      raise MalformedError("a stored member has two sizes")
    found.append((name, crc, size, place))
  if at != len(data):
    raise MalformedError("its zip directory has more than its entries")
  return found


def _wide(extra: bytes, *values: int) -> tuple[int, ...]:
  """Returns the values, with those beyond 32 bits read from the extra field, in this order."""
  at, wide = 0, b""
  while at + 4 <= len(extra):
    kind, length = struct.unpack_from("<HH", extra, at)
    if kind == 1:
      wide = extra[at + 4 : at + 4 + length]
      break
    at += 4 + length
  left = list(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
  result = []
  for value in values:
    if value == _IN_ZIP64:
      if not left:
        raise MalformedError("a zip64 field is missing")
      value = left.pop(0)
    result.append(value)
  return tuple(result)


def _damaged(member: Member) -> str:
  return f"{_shown(member.name)} is damaged: its CRC-32 is not the one that was written"


def _shown(name: str) -> str:
  return ascii(name[:80]).strip("'")
