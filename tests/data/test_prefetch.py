"""Threads that prefetch neither keep a process from exiting nor are cut off within a library."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.conftest import REPOSITORY

# Prints what the thread was able to end while the process exits.
PROGRAM = """
import time
from llava_sp_jax.data import prefetch
prefetch.EXIT_SECONDS = 1.0
def make(number):
  if number:
    time.sleep({seconds})
    print("ended", flush=True)
  return number
p = prefetch.Prefetcher(make, 0, 1, 2)
p.take(lambda: False)
time.sleep(.2)
"""


@pytest.mark.parametrize(("seconds", "ended"), [(0.5, True), (1000, False)])
def test_the_exit_waits_for_threads_at_work_but_not_for_one_that_hangs(
  seconds: float, ended: bool
) -> None:
  begun = time.monotonic()
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM.format(seconds=seconds)],
    capture_output=True,
    text=True,
    cwd=REPOSITORY,
    check=True,
    timeout=100,
  )
  assert (done.stdout == "ended\n") == ended
  assert time.monotonic() - begun < 90
