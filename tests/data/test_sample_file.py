"""Files of samples: what is read, in which encodings, and the one line that anything else gets."""

from __future__ import annotations

import codecs
import json
import os
import re
from pathlib import Path

import pytest

from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import sample_file, sources
from llava_sp_jax.data.failure import SampleError

TALK = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "café\u2028☃"}]
SAMPLES = [{"id": i, "conversations": TALK} for i in range(3)]
LINES = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in SAMPLES)
LIST = json.dumps(SAMPLES, ensure_ascii=False)

READ = {
  "a list": LIST.encode(),
  "with line ends of Windows": json.dumps(SAMPLES, indent=1).replace("\n", "\r\n").encode(),
  "with a byte order mark": LIST.encode("utf-8-sig"),
  "UTF-16": LIST.encode("utf-16"),
  "UTF-16 without a mark": LIST.encode("utf-16-be"),
  "lines": LINES.encode(),
  "lines with a mark": LINES.encode("utf-8-sig"),
  "lines with line ends of Windows": LINES.replace("\n", "\r\n").encode(),
  "lines with empty ones": ("\n" + LINES.replace("\n", "\n\n")).encode(),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(name: str, tmp_path: Path) -> None:
  path = tmp_path / "x.json"
  path.write_bytes(READ[name])
  assert list(sample_file.read(path)) == SAMPLES
  assert len(sources.LlavaJson(str(path), "", lambda image: image)) == 3


@pytest.mark.parametrize("indent", [None, 1])
def test_one_sample_alone(indent: int | None, tmp_path: Path) -> None:
  path = tmp_path / "x.jsonl"
  path.write_text(json.dumps(SAMPLES[0], indent=indent))
  assert list(sample_file.read(path)) == SAMPLES[:1]


def test_a_torn_line_is_the_failure_of_its_sample(tmp_path: Path) -> None:
  path = tmp_path / "x.jsonl"
  first, second, third = (
    LINES.split("\n")[0] + "\n",
    '{"id": 1, "conv',
    '{"a": 1' + "0" * 5000,
  )
  path.write_text(first + second + "\n" + third + "\n" + first)
  found = list(sample_file.read(path))
  assert [isinstance(sample, SampleError) for sample in found] == [False, True, True, False]
  at = len(first.encode()) + len('{"id": 1, ')
  assert str(found[1]) == f"x.jsonl, line 2 is not JSON (Unterminated string starting at byte {at})"
  assert str(found[2]).startswith("x.jsonl, line 3 is not JSON (Expecting ',' delimiter at byte ")


def test_bytes_that_are_no_text_cost_their_lines(tmp_path: Path) -> None:
  path, bad = tmp_path / "x.jsonl", LINES.split("\n")[0].encode().replace(b"what", b"wh\xe9t")
  path.write_bytes(LINES.encode() + bad + b"\r\n" + LINES.encode())
  found = list(sample_file.read(path))
  assert [isinstance(sample, SampleError) for sample in found] == [*[False] * 3, True, *[False] * 3]
  assert [*found[:3], *found[4:]] == SAMPLES * 2
  at = path.read_bytes().index(0xE9)
  assert str(found[3]).startswith(f"x.jsonl, line 4 is not utf-8 text (byte 0xe9 at {at})")


# An item that is no sample of its own -> why; each stands between two sound ones.
ITEMS: dict[bytes, str] = {
  b'{"id": "caf\xe9", "a": "[\\"]"}': r"is not utf-8 text \(byte 0xe9 at {at}\); save it as UTF-8",
  b'{"id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": r"at byte \d+ is not JSON \(nested too deeply\)",
  b'{"id": "a\nb"}': r"is not JSON \(Invalid control character at byte {at}\)",
  b'{"id": \'a\'}': r"is not JSON \(Expecting value at byte {at}\)",
  b'{"id": 1 "a": "\xc3\xa9"}': r"is not JSON \(Expecting ',' delimiter at byte {at}\)",
  b'{"id": "\\u12"}': r"is not JSON \(Invalid \\uXXXX escape at byte {at}\)",
  b"": r"is not JSON \(Expecting value at byte {at}\)",
}  # fmt: skip
BAD = {b"caf\xe9": 4, b"a\nb": 2, b"'a'": 1, b'"a": "\xc3': 1, b"\\u12": 2}  # where, in which text


@pytest.mark.parametrize("start", [b"", codecs.BOM_UTF8])
@pytest.mark.parametrize("item", ITEMS)
def test_a_list_loses_only_the_item_that_is_none(item: bytes, start: bytes, tmp_path: Path) -> None:
  path, sound = tmp_path / "x.json", json.dumps(SAMPLES[0], ensure_ascii=False).encode()
  path.write_bytes(start + b"[" + sound + b",\r\n" + item + b" , " + sound + b"]\n")
  first, bad, last = sample_file.read(path)
  assert first == last == SAMPLES[0]
  assert isinstance(bad, SampleError)
  data = path.read_bytes()
  within = data.index(item, len(start) + 1 + len(sound) + 2) if item else data.index(b" , ") + 1
  at = within + sum(item.index(text) + more - 1 for text, more in BAD.items() if text in item)
  assert re.fullmatch(rf"x\.json, item 2 {ITEMS[item].replace('{at}', str(at))}", str(bad)), (
    bad,
    at,
  )


def test_a_deep_line_or_a_list_in_front_costs_its_line(tmp_path: Path) -> None:
  path, sound = tmp_path / "x.jsonl", LINES.split("\n")[0] + "\n"
  depth = 100_000  # later Pythons read some thousands
  path.write_text('{"id": ' + "[" * depth + "]" * depth + "}\n" + sound)
  assert [isinstance(sample, SampleError) for sample in sample_file.read(path)] == [True, False]
  path.write_text("[1, 2]\n" + sound * 2)
  assert list(sample_file.read(path)) == [[1, 2], *SAMPLES[:1] * 2]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_items_of_other_encodings_are_told_apart(encoding: str, tmp_path: Path) -> None:
  path = tmp_path / "x.json"
  path.write_bytes(LIST.replace('"id": 1', '"id": x').encode(encoding))
  first, bad, last = sample_file.read(path)
  assert [first, last] == [SAMPLES[0], SAMPLES[2]]
  assert str(bad).startswith("x.json as UTF-8, item 2 is not JSON (Expecting value at byte ")


def test_a_number_of_any_length_does_not_cost_the_file(tmp_path: Path) -> None:
  """Python reads 4,300 digits; an id of more is kept as a text."""
  digits = "1" + "0" * 5000
  for name, text in {
    "list": LIST.replace('"id": 1,', f'"id": {digits},'),
    "lines": LINES.replace('"id": 1,', f'"id": {digits},'),
  }.items():
    (tmp_path / name).write_text(text)
    found = sample_file.read(tmp_path / name)
    assert [sample["id"] for sample in found] == [0, digits, 2]


def test_half_a_surrogate_pair_does_not_cost_the_file(tmp_path: Path) -> None:
  path = tmp_path / "x.json"
  path.write_bytes(LIST.encode().replace("☃".encode(), b"\xed\xa0\xbd"))
  assert sample_file.read(path)[0]["conversations"][1]["value"].endswith("\ud83d")


REFUSED: dict[str, tuple[bytes, str]] = {
  "empty": (b"", r"is not JSON \(it is empty\)"),
  "blank": (b" \n", r"is not JSON \(it is empty\)"),
  "cut": (LIST.encode()[:60], r"is not JSON \(Unterminated string .*char"),
  "Latin-1": (LIST.replace("\u2028☃", "").encode("latin-1"), r"is not utf-8 text \(byte 0xe9 at 95"),
  "a picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"is not utf-8 text \(byte 0x89 at 0\)"),
  "a list within": (
    json.dumps({"data": SAMPLES}).encode(), "is not a list .* but a dict with keys 'data'"),
  "cut, deep": (LIST.encode()[:-1] + b"," + b"[" * 5000, r"is not JSON \(|is not a list"),
  "cut behind an item": (LIST.encode()[:-1], r"is not JSON \(Expecting ',' delimiter"),
  "cut lines of a list": (LIST.replace("}, ", "},\n").encode()[:-1], r"is not JSON \(Expecting"),
  "two lists": (LIST.encode() * 2, r"is not JSON \(Extra data"),
  "Latin-1 behind a mark": (codecs.BOM_UTF8 + LIST.replace("\u2028☃", "").encode("latin-1"),
                            r"is not utf-8 text \(byte 0xe9 at 98"),
  "a list of none": (b'[1, "\xe9"]', r"is not utf-8 text"),
  "blank UTF-16": ("\ufeff \n".encode("utf-16-le"), r"is not JSON \(it is empty\)"),
  "deep": (b"[" * 100_000, r"is not a list of samples \(nested too deeply\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_one_short_line_names_the_file(name: str, tmp_path: Path) -> None:
  content, message = REFUSED[name]
  path = tmp_path / "x.json"
  path.write_bytes(content)
  with pytest.raises(ConfigError, match=f"^data.path: .*x.json {message}") as raised:
    sample_file.read(path)
  assert len(str(raised.value).replace(str(path), "")) < 320
  assert "\n" not in str(raised.value)
  assert str(raised.value).endswith(sample_file.EXPECTED)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
  os.mkfifo(tmp_path / "pipe.json")
  for name in ("pipe.json", "gone.json", ".", "x" * 5000, "x\0y"):
    with pytest.raises(FileNotFoundError, match=r"data\.path: no file"):
      sample_file.read(tmp_path / name)
  with pytest.raises(FileNotFoundError, match=r"data\.validation_path: no file"):
    sample_file.read(tmp_path / "gone.json", "data.validation_path")
