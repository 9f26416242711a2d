"""safetensors: equal to the library's own reader, and headers that do not fit their file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from llava_sp_jax.convert.safetensors_file import DTYPES, open_safetensors
from llava_sp_jax.files import FormatError
from tests.convert.torch_files import SIX

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def save(path: Path, header: Any, data: bytes = SIX.tobytes()) -> Path:
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data)
  return path


def refused(path: Path, message: str) -> None:
  with pytest.raises(FormatError, match=message) as raised:
    open_safetensors(path)
  assert str(raised.value).startswith(f"{path}: ")
  assert "\n" not in str(raised.value)


def test_equal_to_the_library(tmp_path: Path) -> None:
  names = {np.dtype(d): k for k, d in DTYPES.items() if k != "BF16"}
  arrays = {name: np.arange(6).astype(dtype).reshape(2, 3) for dtype, name in names.items()}
  arrays |= {"none": SIX[:0], "one": np.array(3, np.float32), "odd": np.arange(3, dtype=np.uint8)}
  safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
  found = open_safetensors(tmp_path / "x.safetensors")
  assert found.keys() == arrays.keys()
  for name, wanted in arrays.items():
    assert (found[name].shape, found[name].dtype) == (wanted.shape, wanted.dtype)
    np.testing.assert_array_equal(found[name].array(), wanted)


def test_bfloat16_and_values_at_an_odd_place(tmp_path: Path) -> None:
  """The library pads its headers; others need not."""
  stored = np.array([0x3F80, 0x4000, 0x4040], "<u2").tobytes()
  text = json.dumps({"a": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
  path = save(tmp_path / "x.safetensors", text + b" " * (1 - len(text) % 2), stored)
  values = open_safetensors(path)["a"].array()
  assert str(values.dtype) == "bfloat16"
  np.testing.assert_array_equal(values.astype(np.float32), [1, 2, 3])
  assert values.flags.aligned


def entry(**changes: Any) -> dict[str, Any]:
  return {"a": ENTRY | changes}


TWO = {"a": ENTRY, "b": ENTRY | {"data_offsets": [24, 48]}}
HOSTILE: dict[str, tuple[Any, str]] = {
  "another size": (entry(shape=[2, 4]), "has 24 bytes, but its shape and dtype need 32"),
  "a product of 2^64": (entry(shape=[1 << 32, 1 << 32]), "larger than any array"),
  "zero and a huge size": (entry(shape=[0, 1 << 70], data_offsets=[0, 0]), "non-negative integers"),
  "a float": (entry(shape=[2.0, 3]), "non-negative integers"),
  "true": (entry(shape=[True, 6]), "non-negative integers"),
  "a negative size": (entry(shape=[-2, -3]), "non-negative integers"),
  "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 24]}}, "is not described by"),
  "another key": (entry(strides=[1]), "is not described by"),
  "a list": ({"a": [1]}, "is not described by"),
  "shape is a text": (entry(shape="23"), "no list of sizes"),
  "three offsets": (entry(data_offsets=[0, 24, 24]), "no two offsets"),
  "offsets turned round": (entry(shape=[0], data_offsets=[24, 0]), "has -24 bytes"),
  "beyond the file": (entry(data_offsets=[8, 32]), "begins at byte 8, but"),
  "overlap": ({**TWO, "b": ENTRY | {"data_offsets": [0, 24]}}, "b begins at byte 0, but the tensors"),
  "too short": (TWO, "its tensors need .* bytes, but the file has"),
  "too long": ({}, "its tensors need .* bytes, but the file has"),
  "unknown dtype": (entry(dtype="F8_E4M3"), "has dtype 'F8_E4M3'; known: F64"),
  "dtype is a list": (entry(dtype=[]), "has dtype"),
  "metadata of numbers": ({"__metadata__": {"a": 1}, **entry()}, "__metadata__ is no object"),
  "a name with a line break": ({"a\nb": ENTRY}, "name is no printable text"),
  "a name twice": (b'{"a": 1, "a": 2}', "the key 'a' is given twice"),
  "NaN": (b'{"a": NaN}', "NaN is no number of JSON"),
  "deep": (b'{"a":' * 40 + b"1" + b"}" * 40, "nested deeper than 32"),
  "no object": (b"[1]", "expected a JSON object"),
  "no JSON": (b"{" * 30, "not JSON"),
  "many values": (b'{"a":[' + b"0," * 600_000 + b"0]}", "about 600,002 values"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_header_is_one_line(tmp_path: Path, what: str) -> None:
  header, message = HOSTILE[what]
  refused(save(tmp_path / "x.safetensors", header), message)


@pytest.mark.parametrize("length", [1 << 63, 1 << 40, 100])
def test_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
  (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
  refused(tmp_path / "x.safetensors", f"a header of {length:,} bytes in a file of 10")


def test_files_that_are_too_short(tmp_path: Path) -> None:
  path = save(tmp_path / "x.safetensors", entry())
  content = path.read_bytes()
  for size in (0, 7, 20, len(content) - 1):
    path.write_bytes(content[:size])
    refused(path, "cannot be read as safetensors|header: not JSON|header of")
