"""The container of GGUF: equal to the library's reader, and heads that promise more than there is."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax.convert import gguf as ours
from llava_sp_jax.convert import gguf_file
from llava_sp_jax.files import FormatError

gguf: Any = pytest.importorskip("gguf")

U8, F32, BOOL, TEXT, ARRAY = 0, 6, 7, 8, 9
BLOCKS = {int(k): v for k, v in gguf.GGML_QUANT_SIZES.items()}


def text(value: bytes) -> bytes:
  return struct.pack("<Q", len(value)) + value


def pair(name: bytes, kind: int, value: bytes) -> bytes:
  return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes = b"t", shape: tuple[int, ...] = (4,), kind: int = 0, at: int = 0) -> bytes:
  axes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
  return text(name) + axes + struct.pack("<IQ", kind, at)


def head(
  *parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3, magic: bytes = b"GGUF"
) -> bytes:
  return magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def save(path: Path, content: bytes, data: bytes = b"") -> Path:
  path.write_bytes(content + b"\0" * (-len(content) % 32) + data)
  return path


def array(kind: int, count: int, items: bytes = b"") -> bytes:
  return pair(b"a", ARRAY, struct.pack("<IQ", kind, count) + items)


MUCH = 1 << 60
DATA = np.arange(4, dtype=np.float32).tobytes()
HOSTILE: dict[str, tuple[bytes, bytes, str]] = {
  "another magic": (head(magic=b"GGML"), b"", "does not begin with GGUF"),
  "version 1": (head(version=1), b"", "version 1; known: 2 and 3"),
  "2^60 tensors": (head(tensors=MUCH), b"", "1,152,921,504,606,846,976 tensors"),
  "2^60 keys": (head(keys=MUCH), b"", "and 1,152,921,504,606,846,976 keys"),
  "60,000 tensors that are not there": (head(tensors=60_000), b"", "longer than the file"),
  "4,000 keys that are not there": (head(keys=4_000), b"", "longer than the file"),
  "2^60 bytes": (head(array(U8, MUCH), keys=1), b"", "longer than the file"),
  "2^60 texts": (head(array(TEXT, MUCH), keys=1), b"", "texts, expected at most"),
  "900,000 texts that are not there": (head(array(TEXT, 900_000), keys=1), b"", "longer than"),
  "2^60 arrays": (head(array(ARRAY, MUCH), keys=1), b"", "expected texts or numbers"),
  "a text of 2^60 bytes": (head(struct.pack("<Q", MUCH), keys=1), b"", "a text of 1,152"),
  "a type that there is not": (head(pair(b"a", 99, b""), keys=1), b"", "unknown type 99"),
  "a key twice": (head(pair(b"a", U8, b"x") * 2, keys=2), b"", "the key a is given twice"),
  "a key that is no text": (head(pair(b"\xff", U8, b"x"), keys=1), b"", "not UTF-8"),
  "a key with a line break": (head(pair(b"\n", U8, b"x"), keys=1), b"", "no printable text"),
  "alignment 0": (
    head(pair(b"general.alignment", 4, struct.pack("<I", 0)), keys=1), b"", "no power of two"),
  "alignment of 2 GB": (
    head(pair(b"general.alignment", 4, struct.pack("<I", 1 << 31)), keys=1), b"", "no power of two"),
  "no axes": (head(tensor(shape=()), tensors=1), DATA, "t has 0 axes"),
  "2^32 axes": (head(text(b"t") + struct.pack("<I", 2**32 - 1), tensors=1), DATA, "axes, expected 1"),
  "a product of 2^80": (head(tensor(shape=(1 << 40, 1 << 40)), tensors=1), DATA, "larger than any"),
  "beyond the file": (head(tensor(shape=(5,)), tensors=1), DATA, "t needs .* bytes, but the file has"),
  "at 2^60": (head(tensor(at=MUCH), tensors=1), DATA, "t needs .* bytes, but the file has"),
  "not aligned": (head(tensor(shape=(1,), at=4), tensors=1), DATA, "is not aligned"),
  "one in the other": (head(tensor(), tensor(b"u"), tensors=2), DATA, "u overlaps another|t overlaps"),
  "one name": (head(tensor(), tensor(at=32), tensors=2), DATA * 8, "two tensors have one name"),
  "half a block": (head(tensor(kind=2), tensors=1), DATA, "no whole blocks of 32"),
  "an unknown kind": (head(tensor(kind=999), tensors=1), DATA, "stored as the unknown type 999"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_head_is_one_line(tmp_path: Path, what: str) -> None:
  content, data, message = HOSTILE[what]
  path = save(tmp_path / "x.gguf", content, data)
  begin = time.process_time()
  with pytest.raises(FormatError, match=message) as raised:
    gguf_file.open_container(path, BLOCKS)
  assert str(raised.value).startswith(f"{path}: cannot be read as GGUF: ")
  assert "\n" not in str(raised.value)
  assert time.process_time() - begin < 1


@pytest.mark.parametrize("size", [0, 3, 23])
def test_a_file_that_is_too_short(tmp_path: Path, size: int) -> None:
  (tmp_path / "x.gguf").write_bytes(head()[:size])
  with pytest.raises(FormatError, match="the file ends too early"):
    gguf_file.open_container(tmp_path / "x.gguf", BLOCKS)


def test_values_and_places_are_those_of_the_library(tmp_path: Path) -> None:
  parts = (
    pair(b"n", 4, struct.pack("<I", 7)),
    pair(b"f", F32, struct.pack("<f", 0.5)),
    pair(b"yes", BOOL, b"\1"),
    pair(b"s", TEXT, text("ü".encode())),
    array(TEXT, 2, text(b"x") + text(b"")),
    tensor(),
    tensor(b"u", (2, 3), at=32),
  )
  path = save(tmp_path / "x.gguf", head(*parts, keys=5, tensors=2), DATA + b"\0" * 16 + DATA * 2)
  found, theirs = gguf_file.open_container(path, BLOCKS), gguf.GGUFReader(path)
  for name in ("n", "f", "yes"):
    assert found.values[name] == theirs.fields[name].contents()
  assert [found.values["s"].decode()] == [theirs.fields["s"].contents()]
  assert [x.decode() for x in found.values["a"]] == theirs.fields["a"].contents()
  for place, wanted in zip(found.tensors, theirs.tensors, strict=True):
    assert (place.name, place.start) == (wanted.name, wanted.data_offset)
    assert place.shape == tuple(wanted.shape[::-1])


@pytest.mark.parametrize(
  "kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "Q4_K", "Q6_K", "BF16", "F16", "F32"]
)
def test_values_are_those_of_the_library(tmp_path: Path, kind: str) -> None:
  number = gguf.GGMLQuantizationType[kind]
  values, size = gguf.GGML_QUANT_SIZES[number]
  stored = np.random.default_rng(0).integers(0, 120, (2, 256 // values * size), dtype=np.uint8)
  place = tensor(b"output.weight", (256, 2), int(number))
  path = save(tmp_path / "x.gguf", head(place, tensors=1), stored.tobytes())
  container = gguf_file.open_container(path, BLOCKS)
  found = ours._reader(container, container.tensors[0])()
  wanted = gguf.quants.dequantize(stored, number)
  np.testing.assert_array_equal(found, wanted.reshape(2, 256))
  assert found.dtype == np.float32


def test_kinds_without_a_rule_are_refused(tmp_path: Path) -> None:
  kind = int(gguf.GGMLQuantizationType.I32)
  path = save(tmp_path / "x.gguf", head(tensor(b"output.weight", kind=kind), tensors=1), DATA)
  container = gguf_file.open_container(path, BLOCKS)
  with pytest.raises(FormatError, match=r"output.weight is stored as I32, which is not read"):
    ours._reader(container, container.tensors[0])
