"""Threads that prefetch neither keep a process from exiting nor are cut off within a library."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import time
from collections.abc import Callable

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

  ahead = prefetch.Ahead(lambda number: functools.partial(load, number), 8)
  reader = prefetch.Prefetcher(make, 0, 1, 2, ahead)
  for number in range(20):
    assert reader.take(lambda: False) == (number, 10 * number)
    assert max(most) < number + 3  # made no further ahead than the room
  with pytest.raises(ValueError, match="cannot be loaded"):
    reader.take(lambda: False)
  reader.close()


def test_a_thread_begins_several_before_it_waits() -> None:
  """As many as fit; what cannot be begun, and what fails later, is an error of its own place."""
  events: list[tuple[str, int]] = []

  def begin(number: int) -> Callable[[], int]:
    events.append(("begun", number))
    if number == 5:
      raise ValueError("five cannot be begun")

    def wait() -> int:
      events.append(("waits", number))
      if number == 6:
        raise ValueError("six fails")
      return 10 * number

    return wait

  reader = prefetch.Prefetcher(lambda _, loaded: loaded, 0, 1, 8, prefetch.Ahead(begin, 2))
  for number in range(100):
    if number in (5, 6):
      with pytest.raises(ValueError, match={5: "five", 6: "six"}[number]):
        reader.take(lambda: False)
    else:
      assert reader.take(lambda: False) == 10 * number
  reader.close()
  for first in range(0, 100, 4):  # two threads share a room of eight
    places = [events.index(("begun", number)) for number in range(first, first + 4)]
    assert max(places) < events.index(("waits", first))


@pytest.mark.parametrize(("threads", "room"), [(1, 1), (1, 5), (3, 10), (16, 49), (16, 50), (8, 3)])
def test_no_thread_sleeps_while_there_is_room(threads: int, room: int) -> None:
  """Also where the room is no multiple of what a thread begins at a time."""
  late = time.monotonic() + 100
  ahead = prefetch.Ahead(lambda number: lambda: number, threads)
  reader = prefetch.Prefetcher(lambda _, loaded: loaded, 0, 2, room, ahead)
  for number in range(1000):
    assert reader.take(lambda: time.monotonic() > late) == number  # or Stopped
  reader.close()


def test_what_is_closed_begins_and_waits_for_no_more() -> None:
  """Of a group that was begun, too."""
  waits, goes_on, seen = threading.Event(), threading.Event(), list[int]()

  def begin(number: int) -> Callable[[], None]:
    def wait() -> None:
      seen.append(number)
      waits.set()
      goes_on.wait(60)

    return wait

  reader = prefetch.Prefetcher(lambda *_: None, 0, 1, 8, prefetch.Ahead(begin, 1))
  assert waits.wait(60)
  reader.close()
  goes_on.set()
  reader._work.leave(time.monotonic() + 60)
  assert seen == [0]


def test_the_first_of_a_group_does_not_wait_for_the_last() -> None:
  last = threading.Event()

  def begin(number: int) -> Callable[[], int]:
    return lambda: number if number < 7 or last.wait(60) else -1

  reader = prefetch.Prefetcher(lambda _, loaded: loaded, 0, 1, 8, prefetch.Ahead(begin, 1))
  assert [reader.take(lambda: False) for _ in range(7)] == list(range(7))
  last.set()
  assert reader.take(lambda: False) == 7
  reader.close()
