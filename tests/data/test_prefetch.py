"""Threads that prefetch neither keep a process from exiting nor are cut off within a library."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from llava_sp_jax.data import prefetch
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


def test_what_is_far_is_loaded_by_more_threads_than_make() -> None:
  """Eight load at a time, beyond the room; one makes at a time; the order stays."""
  together, making, most = threading.Barrier(8), threading.Lock(), []

  def load(number: int) -> int:
    if number < 8:
      together.wait(10)  # breaks unless all eight load at once
    if number == 20:
      raise ValueError("cannot be loaded")
    return 10 * number

  def make(number: int, loaded: int) -> tuple[int, int]:
    assert making.acquire(blocking=False)
    most.append(number)
    making.release()
    return number, loaded

  reader = prefetch.Prefetcher(make, 0, 1, 2, prefetch.Ahead(load, 8))
  for number in range(20):
    assert reader.take(lambda: False) == (number, 10 * number)
    assert max(most) < number + 3  # made no further ahead than the room
  with pytest.raises(ValueError, match="cannot be loaded"):
    reader.take(lambda: False)
  reader.close()
