"""Watches a server while a client attacks it: its event loop goes on, and its memory does not grow."""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.serve.live import Live

PROCESS = Path("/proc/self")
LARGE = 32 << 20  # characters of base64
STALL = 5.0  # seconds by the clock, for which other processes may have the machine
GROWTH = 200 << 10  # KiB by which the process may grow


@functools.cache
def decoding() -> float:
  """Seconds of processor time in which a thread of this machine decodes LARGE characters."""
  since = time.thread_time()
  binascii.a2b_base64(b"A" * LARGE, strict_mode=True)
  return time.thread_time() - since


def peak(anew: bool = False) -> int:
  """KiB that this process held at most, `anew` from now on if the system can forget (proc(5))."""
  if anew:
    with contextlib.suppress(OSError):
      (PROCESS / "clear_refs").write_text("5")
  (line,) = (x for x in (PROCESS / "status").read_text().splitlines() if x.startswith("VmHWM"))
  return int(line.split()[1])


async def turn(ends: threading.Event, work: list[float], stalls: list[float]) -> None:
  """Notes what each turn of an event loop takes until `ends` is set, by two clocks.

  `work` is the processor time of the loop's own thread. It does not depend on what else a machine
  does, as `stalls`, of the clock on the wall, do.
  """
  last = time.thread_time(), time.monotonic()
  while not ends.is_set():
    await asyncio.sleep(0.002)
    now = time.thread_time(), time.monotonic()
    for of, before, after in zip((work, stalls), last, now, strict=True):
      of.append(after - before)
    last = now


@contextlib.contextmanager
def alive(server: Live) -> Iterator[list[float]]:
  """Another client is answered within the block; neither the event loop nor memory suffer.

  Yields the processor seconds of each turn of the event loop, which grow within the block.
  """
  ends, work, stalls = threading.Event(), [0.0], [0.0]
  before = peak(anew=True)
  loop = server.server.servers[0].get_loop()
  turning = asyncio.run_coroutine_threadsafe(turn(ends, work, stalls), loop)
  try:
    yield work
    assert server.ask("GET", "/version").status == 200
  finally:
    ends.set()
    turning.result(20)
  assert peak() - before < GROWTH
  longest = max(work), max(stalls)
  assert longest[0] < 2 * decoding()
  assert longest[1] < STALL
