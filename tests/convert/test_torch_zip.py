"""The zip around a torch checkpoint: every member lies in the file, once, as it was written."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from llava_sp_jax.convert import torch_zip
from llava_sp_jax.convert.tensor import DataFile, MalformedError
from llava_sp_jax.convert.torch_bin import open_bin
from llava_sp_jax.files import FormatError
from tests.convert.torch_files import GOOD, SIX, save


def refused(path: Path, message: str) -> None:
  with pytest.raises(FormatError, match=f"{path.name}: .*{message}") as raised:
    open_bin(path)
  assert "\n" not in str(raised.value)


def change(path: Path, at: int, form: str, value: int) -> Path:
  """Writes one number into the file; a negative place counts from its end."""
  content = bytearray(path.read_bytes())
  struct.pack_into(form, content, at % len(content), value)
  path.write_bytes(content)
  return path


ENTRY = b"PK\1\2"


def entry(path: Path, number: int = 1) -> int:
  """Where an entry of the directory starts."""
  content, at = path.read_bytes(), -1
  for _ in range(number + 1):
    at = content.index(ENTRY, at + 1)
  return at


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bomb_is_refused_unread(tmp_path: Path, method: int) -> None:
  path = save(tmp_path / "x.bin", GOOD + b"\0" * (4 << 20), compression=method)
  assert path.stat().st_size < 1 << 17
  refused(path, "is compressed or encrypted")


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
  path = tmp_path / "x.bin"
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("archive/data.pkl", GOOD)
    with pytest.warns(UserWarning, match="Duplicate"):
      archive.writestr("archive/data.pkl", GOOD.replace(b"\0\0\0a", b"\0\0\0b"))
    archive.writestr("archive/data/0", SIX.tobytes())
  refused(path, "two members are archive/data.pkl")


PLACES = {  # of the second entry: offset within it, its form, a hostile value, what is said
  "encrypted": (8, "<H", 1, "compressed or encrypted"),
  "another size": (24, "<L", 20, "a stored member has two sizes"),
  "overlaps the first": (42, "<L", 3, "overlaps another"),
  "header beyond the file": (42, "<L", 1 << 30, "is truncated"),
  "a longer name": (28, "<H", 200, "zip directory is (damaged|truncated)"),
  "another magic": (0, "<L", 0, "zip directory is damaged"),
  "sizes in a field that is not there": (20, "<L", 0xFFFFFFFF, "a zip64 field is missing"),
}  # fmt: skip


@pytest.mark.parametrize("what", PLACES)
def test_a_damaged_entry_is_one_line(tmp_path: Path, what: str) -> None:
  at, form, value, message = PLACES[what]
  path = save(tmp_path / "x.bin")
  refused(change(path, entry(path) + at, form, value), message)


ENDS = {  # of the end record: bytes from its start
  "another count": (10, "<H", 3, "in several parts"),
  "a directory that is elsewhere": (16, "<L", 5, "does not end where its end record begins"),
  "a directory of 4 GB": (12, "<L", 0xFFFFFFF0, "more than any checkpoint"),
  "another disk": (4, "<H", 1, "in several parts"),
  "a comment that is not there": (20, "<H", 9, "bytes behind the end"),
}  # fmt: skip


@pytest.mark.parametrize("what", ENDS)
def test_a_damaged_end_is_one_line(tmp_path: Path, what: str) -> None:
  at, form, value, message = ENDS[what]
  refused(change(save(tmp_path / "x.bin"), -22 + at, form, value), message)


def test_more_entries_than_any_checkpoint_has(tmp_path: Path) -> None:
  path = save(tmp_path / "x.bin")
  for at in (-22 + 8, -22 + 10):
    change(path, at, "<H", 0xFFFF)
  refused(path, "zip directory is truncated")


def test_a_member_that_is_not_where_it_should_be(tmp_path: Path) -> None:
  path = save(tmp_path / "x.bin")
  content = path.read_bytes()
  path.write_bytes(content.replace(b"archive/data/0", b"archive/data/1", 1))  # the local header
  refused(path, "archive/data/0 is not where the zip directory says")


def test_bytes_in_front_and_behind(tmp_path: Path) -> None:
  content = save(tmp_path / "x.bin").read_bytes()
  (tmp_path / "x.bin").write_bytes(b"x" * 40 + content)
  refused(tmp_path / "x.bin", "does not end where")
  (tmp_path / "x.bin").write_bytes(content + b"x")
  refused(tmp_path / "x.bin", "bytes behind the end")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.99])
def test_a_truncated_file_is_an_error(tmp_path: Path, share: float) -> None:
  content = save(tmp_path / "x.bin").read_bytes()
  (tmp_path / "x.bin").write_bytes(content[: int(len(content) * share)])
  refused(tmp_path / "x.bin", "no zip archive, or its end is missing")


def test_sizes_beyond_32_bits(tmp_path: Path) -> None:
  """The fields of zip64, which torch and Python write for small members, too."""
  with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
    for name, content in (("archive/data.pkl", GOOD), ("archive/data/0", SIX.tobytes())):
      with archive.open(name, "w", force_zip64=True) as file:
        file.write(content)
  np.testing.assert_array_equal(open_bin(tmp_path / "x.bin")["a"].array(), SIX.reshape(2, 3))


def with_wide(path: Path, size: int, place: int) -> Path:
  """The last entry with its size and place in 64 bits."""
  content = path.read_bytes()
  at, end = content.rindex(ENTRY), len(content) - 22
  old = bytearray(content[at:end])
  extra = struct.pack("<HHQQQ", 1, 24, size, size, place)
  struct.pack_into("<LL", old, 20, 0xFFFFFFFF, 0xFFFFFFFF)
  struct.pack_into("<H", old, 30, len(extra))
  struct.pack_into("<L", old, 42, 0xFFFFFFFF)
  last = bytearray(content[end:])
  struct.pack_into("<L", last, 12, struct.unpack_from("<L", last, 12)[0] + len(extra))
  path.write_bytes(content[:at] + old + extra + last)
  return path


def test_places_beyond_32_bits(tmp_path: Path) -> None:
  content = save(tmp_path / "x.bin").read_bytes()
  place = content.index(b"archive/data/0") - 30
  good = with_wide(tmp_path / "x.bin", 24, place)
  np.testing.assert_array_equal(open_bin(good)["a"].array(), SIX.reshape(2, 3))
  for size, odd in (
    (24, 2**64 - 1),
    (24, 2**63),
    (2**64 - 1, place),
    (24, place + 1),
    (2**40, place),
  ):
    refused(with_wide(save(tmp_path / "x.bin"), size, odd), "member archive/data/0 ")


def test_a_zip_without_a_checkpoint_and_a_text(tmp_path: Path) -> None:
  with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
    archive.writestr("hello", "x")
  refused(tmp_path / "x.bin", "not a torch checkpoint")
  (tmp_path / "x.bin").write_text("version https://git-lfs")
  refused(tmp_path / "x.bin", "a pointer of Git LFS")
  (tmp_path / "x.bin").write_text("once upon a time")
  refused(tmp_path / "x.bin", "cannot be read as a torch checkpoint")


def test_a_member_s_limit(tmp_path: Path) -> None:
  file = DataFile.open(save(tmp_path / "x.bin"))
  with pytest.raises(MalformedError, match="has 24 bytes, expected at most 23"):
    torch_zip.read(file, torch_zip.members(file)["archive/data/0"], 23)
