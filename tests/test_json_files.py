"""JSON of others: what is good reads as json does, what is hostile is one line, and nothing waits."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import json_files, jsonl
from llava_sp_jax.files import FormatError


def test_good_files(tmp_path: Path) -> None:
  values = {"a": [1, -2.5, None, True, "ü", "\U0001f600"], "model_max_length": 10**30, "b": {}}
  for i, text in enumerate((json.dumps(values), json.dumps(values, ensure_ascii=False), " {} ")):
    for j, encoding in enumerate(("utf-8", "utf-8-sig")):
      path = tmp_path / f"{i}{j}.json"
      path.write_text(text, encoding=encoding)
      assert json_files.read_object(path) == json.loads(text)
  (tmp_path / "list.json").write_text("[1]")
  assert json_files.read(tmp_path / "list.json") == [1]


def nested(depth: int, opening: str = '{"a":', closing: str = "}") -> str:
  return opening * depth + "1" + closing * depth


HOSTILE: dict[str, tuple[str | bytes, str]] = {
  "empty": ("", "not JSON"),
  "cut off": ('{"a": [1,', "not JSON"),
  "NaN": ('{"a": NaN}', "NaN is no number of JSON"),
  "infinity": ('{"a": -Infinity}', "-Infinity is no number of JSON"),
  "infinity in digits": ('{"a": 1e999}', "the number 1e999 is too large"),
  "a huge integer": ('{"a": ' + "9" * 5000 + "}", "an integer of 5,000 digits"),
  "a key twice": ('{"lora_alpha": 1, "lora_alpha": 2}', "the key 'lora_alpha' is given twice"),
  "a key twice inside": ('{"a": [{"b": 1, "b": 1}]}', "the key 'b' is given twice"),
  "33 levels": (nested(33), "nested deeper than 32"),
  "33 lists": (nested(33, "[", "]"), "nested deeper than 32"),
  "100,000 levels": (nested(100_000, "[", "]"), "nested deeper than 32"),
  "100,000 levels, cut off": ("[" * 100_000, "nested deeper than 32"),
  "not UTF-8": (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
  "UTF-16": ('{"a": 1}'.encode("utf-16"), "not UTF-8 at byte 0"),
  "half a pair": (r'{"a": "\ud83d"}', "half a surrogate pair"),
  "half a pair as a key": (r'{"a": [{"\uDE00": 1}]}', "half a surrogate pair"),
  "a list": ("[]", "expected a JSON object, found a list"),
  "null": ("null", "expected a JSON object, found null"),
  "a number": ("1", "expected a JSON object, found a number"),
  "a text": ('"x"', "expected a JSON object, found a text"),
  "more behind it": ("{} {}", "not JSON"),
  "comments": ('{"a": 1} // x', "not JSON"),
  "600,000 lists": ("[" + "[]," * 600_000 + "1]", "about 1,200,001 values"),
  "zeros": (b"\0" * 1000, "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_hostile_is_one_line(tmp_path: Path, what: str) -> None:
  content, message = HOSTILE[what]
  path = tmp_path / "config.json"
  path.write_bytes(content if isinstance(content, bytes) else content.encode())
  begin = time.process_time()
  refused(path, message)
  assert time.process_time() - begin < 1


def refused(path: Path, message: str) -> None:
  with pytest.raises(FormatError, match=message) as raised:
    json_files.read_object(path)
  assert "\n" not in str(raised.value)
  assert path.name[:50] in str(raised.value)
  assert len(str(raised.value)) < len(str(path)) + 200


def test_32_levels_are_read(tmp_path: Path) -> None:
  (tmp_path / "x.json").write_text(nested(32))
  assert json_files.read_object(tmp_path / "x.json")


def test_a_whole_pair_is_read(tmp_path: Path) -> None:
  (tmp_path / "x.json").write_text(r'{"a": "\ud83d\ude00"}')
  assert json_files.read_object(tmp_path / "x.json") == {"a": "\U0001f600"}


def test_a_file_beyond_the_limit_is_not_read(tmp_path: Path) -> None:
  with (tmp_path / "x.json").open("wb") as file:
    file.truncate(1 << 40)  # a hole: it takes no space
  refused(tmp_path / "x.json", "1,099,511,627,776 bytes, expected at most 16,777,216")


def special(path: Path, kind: str) -> Path:
  """Something at `path` that is no regular file."""
  make: dict[str, Any] = {
    "a pipe": lambda: os.mkfifo(path),
    "a folder": path.mkdir,
    "a device": lambda: path.symlink_to("/dev/zero"),
    "no such file": lambda: None,
    "cannot be opened": lambda: path.symlink_to(path),
  }
  make[kind]()
  return path


@pytest.mark.parametrize(
  "kind", ["a pipe", "a folder", "a device", "no such file", "cannot be opened"]
)
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
  refused(special(tmp_path / "x.json", kind), kind)


@pytest.mark.parametrize("name", ["x" * 300, "x\0y"])
def test_names_that_no_file_has(tmp_path: Path, name: str) -> None:
  with pytest.raises(FormatError, match="cannot be opened"):
    json_files.read(tmp_path / name)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/no/such", path)])
def test_lines_go_to_a_regular_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
  """A pipe in place of the metrics would stop a run at its first record, for ever."""
  path = tmp_path / "metrics.jsonl"
  make(path)
  for use in (lambda: jsonl.append(path, {"step": 1}), lambda: jsonl.cut_after(path, 1)):
    with pytest.raises(OSError, match="expected a regular file; move away what is there"):
      use()
