"""Logs forget what will be done again, and lines that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_sp_jax import jsonl


def test_steps_to_be_done_again_are_forgotten(tmp_path: Path) -> None:
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
  assert jsonl.cut_after(path, 2) == 0, "the end that a kill cut off is no damage"
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
  assert jsonl.cut_after(tmp_path / "gone.jsonl", 2) == 0
  assert not (tmp_path / "gone.jsonl").exists()


@pytest.mark.parametrize(
  "line",
  [
    b"",
    b'{"step": 1, "lo{"step": 2}',
    b"5",
    b"[]",
    b"[" * 5000,
    b'{"step": null}',
    b"\xff",
    b'{"x": 1}',
  ],
)
def test_a_line_that_cannot_be_read_is_dropped_and_counted(tmp_path: Path, line: bytes) -> None:
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n{"step": 3}\n')
  assert jsonl.cut_after(path, 2) == 1
  assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
