"""An xplane trace of some steps, for xprof, TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llava_sp_jax import config as config_lib

FOLDER = "profile"


def steps_of(text: str, first: int, last: int) -> range:
  """ "A:B" -> the steps A..B, both included, of a run that does `first`..`last`; "" -> none.

  Raises: ConfigError for another form, and for steps that the run does not do.
  """
  if not text:
    return range(0)
  match = re.fullmatch(r"(\d+):(\d+)", text)
  if not match:
    raise config_lib.ConfigError(
      f"--profile: expected A:B, two steps such as 10:12, found {text!r}"
    )
  a, b = int(match[1]), int(match[2])
  if not first <= a <= b <= last:
    raise config_lib.ConfigError(
      f"--profile: steps {a} to {b} are not among those that this run will do, {first} to {last}"
    )
  return range(a, b + 1)


class Profiler:
  """Traces the wanted steps and nothing else; every process writes its own devices."""

  def __init__(self, text: str, folder: Path, first: int, last: int):
    """Raises: ConfigError as `steps_of`."""
    self._wanted, self._folder = steps_of(text, first, last), folder / FOLDER
    self._running = False

  def __enter__(self) -> Profiler:
    return self

  def __exit__(self, *_: Any) -> None:
    self._stop()  # a run that ends early keeps what it has

  @contextlib.contextmanager
  def step(self, number: int, pending: Any) -> Iterator[None]:
    """Around the dispatch of step `number`; `pending` is what the step before it still computes."""
    if number not in self._wanted:
      yield
      return
    if not self._running:
      jax.block_until_ready(pending)
      jax.profiler.start_trace(self._folder)
      self._running = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def after(self, number: int, metrics: Any) -> None:
    """The trace ends when the last wanted step has been computed."""
    if self._running and number == self._wanted[-1]:
      jax.block_until_ready(metrics)
      self._stop()
      print(f"profile of steps {self._wanted[0]} to {number}: {self._folder}", flush=True)

  def _stop(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
