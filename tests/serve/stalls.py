"""Watches a server while a client attacks it: its event loop goes on, and its memory does not grow."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import resource
import threading
import time
from collections.abc import Iterator

from tests.serve.live import Live

STALL = 0.1  # seconds for which the event loop may stand still on a machine with time for it
GROWTH = 200 << 10  # KiB by which the process may grow
LARGE = 35 << 20  # bytes, of a body with a picture of 25 MB
NOISE = 0.5  # seconds for which the machine is watched, if it may be the cause


async def turn(ends: threading.Event, stalls: list[float]) -> None:
  """Notes how long each turn of an event loop takes beyond its pause, until `ends` is set.

  That is told by the clock or by the processor time of this process, whichever is less: the clock also
  runs while other processes do, and processor time twice as fast while two threads work.
  """

  def clocks() -> tuple[float, float]:
    return time.monotonic(), time.process_time()

  last = clocks()
  while not ends.is_set():
    await asyncio.sleep(0.002)
    now = clocks()
    stalls.append(min(now[0] - last[0], now[1] - last[1]))
    last = now


def longest_stall() -> float:
  """STALL, or three times what this machine needs now for as little as a server does.

  That is one copy of a large body, during which no other thread of Python runs, and a turn of an event
  loop beside a thread that works without Python, as decoders do.
  """
  content, ends, found = bytes(LARGE), threading.Event(), [0.0]
  for _ in range(5):
    begun = time.monotonic()
    bytearray(content)
    found.append(time.monotonic() - begun)

  def work() -> None:
    until = time.monotonic() + NOISE
    while time.monotonic() < until:
      hashlib.sha256(content)
    ends.set()

  thread = threading.Thread(target=work)
  thread.start()
  asyncio.run(turn(ends, found))
  thread.join()
  return max(STALL, 3 * max(found))


@contextlib.contextmanager
def alive(server: Live) -> Iterator[None]:
  """Another client is answered within the block; neither the event loop nor memory suffer."""
  ends, stalls = threading.Event(), [0.0]
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  loop = server.server.servers[0].get_loop()
  turning = asyncio.run_coroutine_threadsafe(turn(ends, stalls), loop)
  try:
    yield
    assert server.ask("GET", "/version").status == 200
  finally:
    ends.set()
    turning.result(20)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < GROWTH
  assert max(stalls) < STALL or max(stalls) < longest_stall()
