"""Damaged files of every kind that is read: each is right or refused in one line, in time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.convert import fuzz

pytest.importorskip("gguf")
FEW, MANY = 60, 250  # of each of eight kinds: 2,000 in all
LONGEST = 300  # characters of a line, without the name of the folder


def opened(kind: str, first: int, count: int) -> list[dict[str, Any]]:
  """What became of each file. Fails where the process was ended by a limit, or by an error."""
  command = [
    sys.executable,
    "-W",
    "error",
    "-m",
    "tests.convert.fuzz",
    kind,
    str(first),
    str(count),
  ]
  done = subprocess.run(
    command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20 * fuzz.WAITING
  )
  lines = [json.loads(line) for line in done.stdout.splitlines()]
  assert done.returncode == 0, (
    f"{kind} {first + len(lines)}: {done.returncode}\n{done.stderr[-2000:]}"
  )
  assert [line["number"] for line in lines] == list(range(first, first + count))
  return lines


def check(kind: str, first: int, count: int) -> None:
  lines = opened(kind, first, count)
  for line in lines:
    refused = line["refused"].replace(line["folder"], "")
    assert "\n" not in refused, line
    assert len(refused) < LONGEST, line
    assert not refused or refused.startswith(("/", "'/")), f"names no file: {line}"
  read = sum(not line["refused"] for line in lines)
  assert 0 < read < count, f"{read} of {count} were read: the damages are no test"


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files(kind: str) -> None:
  check(kind, 0, FEW)


@pytest.mark.guard
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_two_thousand_damaged_files(kind: str) -> None:
  check(kind, 1000, MANY)


@pytest.mark.parametrize("what", ["hang", "sleep", "memory"])
def test_the_watchdog_bites(what: str) -> None:
  """A file that hangs, waits or takes memory ends the process that opens it."""
  harm = {
    "hang": "while True: pass",
    "sleep": "import time; time.sleep(100)",
    "memory": "bytearray(2 * fuzz.MEMORY)",
  }[what]
  code = f"""
from tests.convert import fuzz
fuzz.SECONDS, fuzz.WAITING = 0.2, 0.5 if {what!r} == "sleep" else 60
def harm(folder, draw):
  {harm}
fuzz.KINDS["json"] = harm
fuzz.main(["json", "0", "1"])
"""
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, timeout=120
  )
  assert done.returncode != 0
  assert not done.stdout
