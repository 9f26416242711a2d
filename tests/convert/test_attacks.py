"""Attacks on the readers that the format's own description does not suggest."""

from __future__ import annotations

import pickle
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llava_sp_jax import json_files
from llava_sp_jax.convert import leaves, tables, torch_io
from llava_sp_jax.convert.tensor import Tensor
from llava_sp_jax.convert.torch_bin import open_bin
from llava_sp_jax.files import FormatError
from tests.convert.torch_files import (
  GOOD,
  HOOKS,
  SIX,
  dictionary,
  get,
  name,
  number,
  numbers,
  put,
  save,
  storage,
  tensor,
  text,
)

LAYER = "model.layers.{}.input_layernorm.weight"


def named(*names: str) -> list[Tensor]:
  return [
    Tensor(n, "x.bin", (4,), np.dtype(np.float32), lambda: np.zeros(4, np.float32)) for n in names
  ]


def problems_of(*names: str) -> list[str]:
  problems: list[str] = []
  leaves.gather(named(*names), tables.LLAMA, problems)
  return problems


def test_a_layer_with_a_huge_number_is_no_list_of_all_before_it() -> None:
  begin = time.process_time()
  (line,) = problems_of(LAYER.format(0), LAYER.format(999_999))
  assert "and 999,958 more are missing" in line
  assert len(line) < 400
  (line,) = problems_of(LAYER.format(10**18))
  assert "unexpected tensor" in line
  assert time.process_time() - begin < 1


@pytest.mark.parametrize("other", ["01", "\u0661", "1_"])
def test_a_layer_has_one_spelling(other: str) -> None:
  """Python's int() reads 01, and the digits of every script, as 1."""
  (line,) = problems_of(LAYER.format(0), LAYER.format(1), LAYER.format(other))
  assert line.startswith("unexpected tensor")


def test_two_names_of_one_leaf_are_told() -> None:
  (line,) = problems_of(LAYER.format(0), LAYER.format(0))
  assert "two tensors are" in line


def refused(path: Path, message: str) -> None:
  begin = time.process_time()
  with pytest.raises(FormatError, match=message) as raised:
    [found.array() for found in open_bin(path).values()]
  assert "\n" not in str(raised.value)
  assert str(raised.value).isprintable()
  assert time.process_time() - begin < 1


def test_hooks_that_are_filled_after_the_check_have_no_effect(tmp_path: Path) -> None:
  hooks = HOOKS + put(1)
  late = get(1) + text("x") + pickle.NONE + pickle.SETITEM
  pickled = dictionary(text("a"), tensor(rest=pickle.NEWFALSE + hooks), text("b"), late)
  refused(save(tmp_path / "x.bin", pickled), "something else under b")


def test_a_storage_s_key_is_a_key_and_no_path(tmp_path: Path) -> None:
  for key in ("../data.pkl", "/etc/passwd", "../../etc/passwd", "0\0", "0/../0"):
    pickled = dictionary(text("a"), tensor(stored=storage(key=text(key))))
    refused(save(tmp_path / "x.bin", pickled), "no storage .* inside")


def test_the_pickle_as_a_storage(tmp_path: Path) -> None:
  """A tensor of the archive's other members: they lie outside of `data/`."""
  pickled = dictionary(text("a"), tensor(stored=storage("ByteStorage", text("../data.pkl"))))
  refused(save(tmp_path / "x.bin", pickled), "no storage .* inside")


def test_two_checkpoints_in_one_archive(tmp_path: Path) -> None:
  path = save(tmp_path / "x.bin")
  with zipfile.ZipFile(path, "a") as archive:
    archive.writestr("other/data.pkl", GOOD)
  refused(path, "not a torch checkpoint")


def test_one_checksum_that_was_taken_out(tmp_path: Path) -> None:
  """Without any, torch was told to write none; a single one was taken out."""
  path = save(tmp_path / "x.bin")
  content = path.read_bytes()
  crc = struct.pack("<L", zlib.crc32(SIX.tobytes()))
  assert content.count(crc) == 2, "in front of the member, and in the directory"
  path.write_bytes(content.replace(crc, b"\0\0\0\0"))
  refused(path, "archive/data/0 is damaged")


def test_a_longer_field_in_front_of_the_values_moves_nothing(tmp_path: Path) -> None:
  path = save(tmp_path / "x.bin")
  content = bytearray(path.read_bytes())
  at = content.index(b"archive/data/0") - 2
  content[at : at + 2] = struct.pack("<H", 8)  # the length of the extra field
  path.write_bytes(content)
  refused(path, "is truncated|is damaged")


def test_text_in_a_name_that_a_terminal_would_obey(tmp_path: Path) -> None:
  for odd in ("\x1b]0;title\x07", "a\rb", "\u202eb", "\x9b31m", "\u2028"):
    refused(save(tmp_path / "x.bin", dictionary(text(odd), tensor())), "no printable text")
    pickled = b"\x80\2" + name("os\x1b[31m", "system") + b"."
    refused(save(tmp_path / "x.bin", pickled), "refuses os")


def test_sixty_thousand_members(tmp_path: Path) -> None:
  with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
    archive.writestr("archive/data.pkl", b"\x80\2}.")
    for i in range(3000):
      archive.writestr(f"archive/data/{i}", b"")
  assert open_bin(tmp_path / "x.bin") == {}


def test_a_shared_storage_is_checked_once_and_holds(tmp_path: Path) -> None:
  """Tied weights: each view is its own window; the whole storage has one checksum."""
  one = tensor(numbers(2), numbers(1), number(4))
  path = save(tmp_path / "x.bin", dictionary(text("a"), tensor(), text("b"), one))
  opened = open_bin(path)
  np.testing.assert_array_equal(opened["b"].array(), SIX[4:])
  np.testing.assert_array_equal(opened["a"].array(), SIX.reshape(2, 3))


LINKS: dict[str, Callable[[Path], None]] = {
  "/dev/zero": lambda path: path.symlink_to("/dev/zero"),
  "/dev/stdin": lambda path: path.symlink_to("/dev/stdin"),
  "/proc/self/mem": lambda path: path.symlink_to("/proc/self/mem"),
  "/proc/kmsg": lambda path: path.symlink_to("/proc/kmsg"),
  "a loop": lambda path: path.symlink_to(path),
  "nothing": lambda path: path.symlink_to(path.with_name("gone")),
}


@pytest.mark.parametrize("ending", [".bin", ".safetensors", ".json"])
@pytest.mark.parametrize("where", LINKS)
def test_links_to_what_is_no_file(tmp_path: Path, where: str, ending: str) -> None:
  """Some files of /proc say that they are regular and empty, and never end."""
  path = tmp_path / f"x{ending}"
  LINKS[where](path)
  read = json_files.read if ending == ".json" else torch_io.open_file
  with pytest.raises(FormatError, match=f"x{ending}"):
    read(path)


def test_a_hole_of_a_terabyte(tmp_path: Path) -> None:
  """A file of a terabyte that takes no space: its head and its end are all that is looked at."""
  for ending, content in (
    (".bin", b"PK\3\4"),
    (".safetensors", b"\2\0\0\0\0\0\0\0{}"),
    (".safetensors", b"\0" * 6 + b"\x80\0"),
  ):
    path = tmp_path / f"x{ending}"
    with path.open("wb") as file:
      file.write(content)
      file.truncate(1 << 40)
    begin = time.process_time()
    with pytest.raises(FormatError, match=f"x{ending}: cannot be read"):
      torch_io.open_file(path)
    assert time.process_time() - begin < 1


def test_a_number_of_many_digits_in_json_is_no_long_computation() -> None:
  begin = time.process_time()
  with pytest.raises(FormatError, match="an integer of 10,000,000 digits"):
    json_files.parse(b'{"a": ' + b"9" * 10_000_000 + b"}", "x.json")
  assert json_files.parse(b'{"a": 0.' + b"1" * 10_000_000 + b"}", "x.json") == {"a": 1 / 9}
  assert time.process_time() - begin < 2
