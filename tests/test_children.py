"""A child process ends with its parent, also when the parent is killed before the child looks."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from llava_sp_jax import children
from tests.conftest import REPOSITORY

CHILD = """
import sys, time
from llava_sp_jax import children
print("begun", flush=True)
time.sleep(float(sys.argv[1]))
children.end_with_parent(0.05)
time.sleep(30)
"""
PARENT = f"""
import os, subprocess, sys
from llava_sp_jax import children
command = [sys.executable, "-c", {CHILD!r}, sys.argv[1]]
subprocess.run(command, start_new_session=True, env=children.environment(os.environ))
"""


@pytest.mark.parametrize("looks_after", ["0", "1.5"])
def test_a_child_ends_with_its_parent(looks_after: str) -> None:
  parent = subprocess.Popen(
    [sys.executable, "-c", PARENT, looks_after],
    stdout=subprocess.PIPE,
    text=True,
    cwd=REPOSITORY,
  )
  assert parent.stdout is not None
  assert parent.stdout.readline() == "begun\n"
  begun = time.monotonic()
  parent.kill()
  parent.wait()
  assert parent.stdout.read() == ""  # which returns when nobody is left to write
  parent.stdout.close()
  assert time.monotonic() - begun < 20


def test_a_process_that_nobody_started_so_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.delenv(children.PARENT, raising=False)
  children.end_with_parent(0.01)
  time.sleep(0.1)
