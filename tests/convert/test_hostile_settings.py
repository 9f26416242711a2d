"""Hostile JSON beside a good checkpoint: right or one line, for every file that is read."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.config import ConfigError
from llava_sp_jax.convert.formats import open_checkpoint
from llava_sp_jax.files import FormatError
from tests.convert.test_formats import GOLDEN

LORA = "cropping/llava-lora"
FILES = (
  f"{LORA}/config.json",
  f"{LORA}/adapter_config.json",
  f"{LORA}/llava_sp.json",
  "base-llm/config.json",
  "base-llm/generation_config.json",
  "base-llm/tokenizer_config.json",
  "base-llm/pytorch_model.bin.index.json",
  "clip-vit-tiny/config.json",
  "clip-vit-tiny/preprocessor_config.json",
)
WHOLE: dict[str, Callable[[Path], Any]] = {
  "nothing": lambda path: path.write_bytes(b""),
  "a list": lambda path: path.write_bytes(b"[]"),
  "null": lambda path: path.write_bytes(b"null"),
  "cut off": lambda path: path.write_bytes(b'{"r": '),
  "NaN": lambda path: path.write_bytes(b'{"lora_alpha": NaN}'),
  "deep": lambda path: path.write_bytes(b'{"a":' * 100_000),
  "deep lists": lambda path: path.write_bytes(b"[" * 1_000_000),
  "UTF-16": lambda path: path.write_bytes("{}".encode("utf-16")),
  "a key twice": lambda path: path.write_bytes(b'{"r": 1, "r": 2}'),
  "half a pair": lambda path: path.write_bytes(rb'{"model_type": "\ud800"}'),
  "a pipe": os.mkfifo,
  "a folder": Path.mkdir,
  "a dead link": lambda path: path.symlink_to("gone"),
}
VALUES = (None, [], {}, "x", -1, 0, 1.5, True, 10**40, [[]], {"a": {}}, "\0\n", 1e300, "x" * 10_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("hostile")
  for name in ("base-llm", "clip-vit-tiny", LORA):
    shutil.copytree(GOLDEN / name, folder / name)
  return folder


def attempt(folder: Path) -> str:
  """What refuses the checkpoint; empty when it opens.

  Sizes that are good by themselves and contradict the tensors are listed, all of them at once.
  """
  begin, line = time.process_time(), ""
  try:
    open_checkpoint(folder / LORA)
  except (FormatError, ConfigError) as error:
    line = str(error)
  assert time.process_time() - begin < 5
  first, *more = line.replace(str(folder), "").split("\n")
  assert len(first) < 600, line
  assert not more or "not fit the model" in first or "is not the base of" in first, line
  return line


def remove(path: Path) -> None:
  if path.is_dir() and not path.is_symlink():
    path.rmdir()
  else:
    path.unlink()


@pytest.mark.parametrize("what", WHOLE)
@pytest.mark.parametrize(
  "name", [FILES[0], *(pytest.param(n, marks=pytest.mark.guard) for n in FILES[1:])]
)
def test_a_hostile_file_is_named(folder: Path, name: str, what: str) -> None:
  path = folder / name
  good = path.read_bytes() if path.is_file() else None
  if good is not None:
    path.unlink()
  WHOLE[what](path)
  try:
    line = attempt(folder)
  finally:
    remove(path)
    if good is not None:
      path.write_bytes(good)
  assert path.name in line
  assert "\n" not in line


@pytest.mark.guard
@pytest.mark.parametrize("name", [n for n in FILES if "index" not in n and "llava_sp" not in n])
def test_a_hostile_value_is_right_or_refused(folder: Path, name: str) -> None:
  """Every key of every file, with two values of other types or sizes for each."""
  path = folder / name
  good = path.read_bytes()
  held, refused = json.loads(good), 0
  try:
    for number, key in enumerate(held):
      for turn in range(2):
        value = VALUES[(2 * number + turn) % len(VALUES)]
        path.write_text(json.dumps({**held, key: value}))
        try:
          refused += bool(attempt(folder))
        except Exception as error:
          pytest.fail(f"{key}={value!r:.60}: {error!r:.300}")
  finally:
    path.write_bytes(good)
  assert refused or path.name == "generation_config.json", "no value was refused"
  assert not attempt(folder), "the good one opens"
