"""Stops a run on request: after the current step, or while it waits for data."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any

from llava_sp_jax.distributed import notices, processes
from llava_sp_jax.training import STOPPED_EARLY

POLL_SECONDS = 0.2  # between two polls of whether any process was asked to stop
GRACE = 0.5  # seconds that data may still take after a process was asked
AGREE = 3.0  # seconds for all processes to reach the barrier of the wait
LIMIT = 12.0  # seconds until an abort if others do not wait; SIGKILL comes 30 s after SIGTERM


class StopRequest:
  """Notes SIGTERM and ctrl-C, and lets the current step finish.

  With `several` processes, all must stop after the same step though only one may get the signal.
  JAX's own SIGTERM handler agrees on that step (`Checkpoints.preempted`), so it stays installed,
  and ctrl-C is turned into a SIGTERM.
  """

  def __init__(self, several: bool = False) -> None:
    self.asked, self._several = False, several
    self._before: dict[int, Any] = {}

  def __enter__(self) -> StopRequest:
    for number in (signal.SIGINT,) if self._several else (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._notice)
    return self

  def during(self, place: str) -> Callable[[], bool]:
    """Returns a function that a wait for data calls to learn whether to give up.

    `place` names the point that the run has reached, such as a step; it must be the same text in
    all processes.
    """
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


def asked_before_the_first_step() -> bool:
  """Returns whether any process had SIGTERM before all have ended their first step.

  Every process must call it after that step. JAX agrees on the number of the step after which all
  stop, but knows no number before the first call of `Checkpoints.preempted`: it chooses step 1 then,
  which a resumed run does not reach any more.
  """
  told = "asked" if notices.asked_to_stop() else ""
  return any(processes.all_gather(told, "asked to stop before the first step"))


class Wait:
  """Decides whether processes that wait for data give up, all at once.

  If all processes wait at the same place, no step is in progress and they stop there. If others
  have begun the step, which cannot be undone, this process waits for LIMIT (12) seconds and then
  aborts the run.
  """

  def __init__(self, place: str):
    self._place, self._looked = place, time.monotonic()
    self._told: float | None = None
    self._tried = False

  def __call__(self) -> bool:
    """Returns whether to give up the wait.

    Only the thread that waits may call it. Once it has returned True, the caller must stop.
    """
    now = time.monotonic()
    if now - self._looked < POLL_SECONDS:
      return False
    self._looked = now
    if self._told is None:
      self._told = now if notices.asked_to_stop() else None
      return False
    waited = now - self._told
    if waited > GRACE and not self._tried:
      self._tried = True
      return processes.barrier_within(f"all wait for data at {self._place}", AGREE)
    if waited > LIMIT:
      notices.abort(
        f"asked to stop, and no data came for {waited:.0f} s at {self._place}, which others have "
        "begun; the same command resumes from the last checkpoint",
        STOPPED_EARLY,
      )
    return False
