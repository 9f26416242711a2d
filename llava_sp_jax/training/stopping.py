"""Ends a run that is asked to stop: after a step, or while it waits for data that may never come."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

from llava_sp_jax.distributed import processes
from llava_sp_jax.training import STOPPED_EARLY

POLL_SECONDS = 0.2  # of a wait, between two polls of whether any process was asked
GRACE = 0.5  # seconds that data may take once one was
AGREE = 3.0  # seconds until all must have said that they wait, too
LIMIT = 12.0  # seconds of waiting on when others do not; SIGKILL follows 30 s after SIGTERM


class StopRequest:
  """Notices SIGTERM (and ctrl-C) and lets the step finish.

  `several` processes must stop after the same step, though only one may have been told. JAX agrees
  on that step when SIGTERM reaches its own handler (`Checkpoints.preempted`), so it is left there.
  """

  def __init__(self, several: bool = False) -> None:
    self.asked, self._several = False, several
    self._before: dict[int, Any] = {}

  def __enter__(self) -> StopRequest:
    for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._notice)
    return self

  def during(self, place: str) -> Callable[[], bool]:
    """What a wait for data asks again and again: whether to give it up. `place` is where the run is,
    in the same words in all processes."""
    return Wait(place) if self._several else lambda: self.asked

  def _notice(self, number: int, frame: Any) -> None:
    if self.asked:
      raise KeyboardInterrupt
    if self._several:
      signal.raise_signal(signal.SIGTERM)
    else:
      self.asked = True

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)


class Wait:
  """Whether processes that wait for data give it up, all of them at once.

  When all wait at the same place, nothing is under way and they stop there. When others have begun
  the step, they cannot take it back: data may come for a while yet, and then this process leaves,
  and with it the run.
  """

  def __init__(self, place: str):
    self._place, self._looked = place, time.monotonic()
    self._told: float | None = None
    self._tried = False

  def __call__(self) -> bool:
    """Called by the one thread that waits; once it has agreed to stop it must do so."""
    now = time.monotonic()
    if now - self._looked < POLL_SECONDS:
      return False
    self._looked = now
    if self._told is None:
      self._told = now if processes.asked_to_stop() else None
      return False
    waited = now - self._told
    if waited > GRACE and not self._tried:
      self._tried = True
      return processes.barrier_within(f"all wait for data at {self._place}", AGREE)
    if waited > LIMIT:
      processes.abort(
        f"asked to stop, and no data came for {waited:.0f} s at {self._place}, which others have "
        "begun; the same command goes on from the last checkpoint",
        STOPPED_EARLY,
      )
    return False
