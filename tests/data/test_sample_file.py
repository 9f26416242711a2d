"""Files of samples: what is read, in which encodings, and the one line that anything else gets."""

from __future__ import annotations

import json
import os
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
  assert sample_file.read(path) == SAMPLES
  assert len(sources.LlavaJson(str(path), "", lambda image: image)) == 3


@pytest.mark.parametrize("indent", [None, 1])
def test_one_sample_alone(indent: int | None, tmp_path: Path) -> None:
  path = tmp_path / "x.jsonl"
  path.write_text(json.dumps(SAMPLES[0], indent=indent))
  assert sample_file.read(path) == SAMPLES[:1]


def test_a_torn_line_is_the_failure_of_its_sample(tmp_path: Path) -> None:
  path = tmp_path / "x.jsonl"
  first, second, third = (
    LINES.split("\n")[0] + "\n",
    '{"id": 1, "conv',
    '{"a": 1' + "0" * 5000,
  )
  path.write_text(first + second + "\n" + third + "\n" + first)
  found = sample_file.read(path)
  assert [isinstance(sample, SampleError) for sample in found] == [False, True, True, False]
  assert str(found[1]).startswith("line 2 is not JSON (Unterminated string")
  assert str(found[2]).startswith("line 3 is not JSON (Expecting ',' delimiter")


def test_bytes_that_are_no_text_cost_their_lines(tmp_path: Path) -> None:
  """A list of samples is one text, and refused."""
  path, bad = tmp_path / "x.jsonl", LINES.split("\n")[0].encode().replace(b"what", b"wh\xe9t")
  path.write_bytes(LINES.encode() + bad + b"\r\n" + LINES.encode())
  found = sample_file.read(path)
  assert [isinstance(sample, SampleError) for sample in found] == [*[False] * 3, True, *[False] * 3]
  assert [*found[:3], *found[4:]] == SAMPLES * 2
  assert str(found[3]).startswith("line 4 is not utf-8 text (byte 0xe9 at ")


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
  for name in ("pipe.json", "gone.json", "."):
    with pytest.raises(FileNotFoundError, match=r"data\.path: no file"):
      sample_file.read(tmp_path / name)
  with pytest.raises(FileNotFoundError, match=r"data\.validation_path: no file"):
    sample_file.read(tmp_path / "gone.json", "data.validation_path")
