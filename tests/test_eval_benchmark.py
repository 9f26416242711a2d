"""The evaluation benchmark compares like with like: both sides answer the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

torch = pytest.importorskip("torch", reason="the other side of the benchmark is torch")


@pytest.mark.slow
def test_the_engine_and_torch_answer_the_same(tmp_path: Path) -> None:
  script = REPOSITORY / "benchmarks/eval_throughput.py"
  arguments = [
    "--size",
    "tiny",
    "--repeats",
    "1",
    "--minutes",
    "0",
    "--out",
    str(tmp_path / "speed"),
  ]
  done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  records = json.loads((tmp_path / "speed.json").read_text())["figures"]["records"]
  assert [r["same_answers"] for r in records] == [r["questions"] for r in records] == [36, 16]
