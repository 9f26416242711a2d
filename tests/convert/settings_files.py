"""Settings of others as files, and errors of one line about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.convert.torch_io import FormatError


def one_line(error: pytest.ExceptionInfo[FormatError]) -> str:
  assert "\n" not in str(error.value)
  assert len(str(error.value)) < 2000
  return str(error.value)


def write(folder: Path, name: str, values: Any) -> Path:
  folder.mkdir(exist_ok=True)
  (folder / name).write_text(json.dumps(values))
  return folder
