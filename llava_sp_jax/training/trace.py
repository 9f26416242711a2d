"""Writes an xplane trace of some steps, for xprof, TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax import storage

FOLDER = "profile"


def steps_of(text: str, first: int, last: int) -> range:
  """Parses the value of --profile: "A:B" is the steps A to B, both included; "" gives no steps.

  `first` and `last` are the first and last step that the run will do.

  Raises: ConfigError for another form, and for steps outside `first`..`last`.
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
  """Traces the requested steps only; each process writes the trace of its own devices."""

  def __init__(self, text: str, folder: Path, first: int, last: int):
    """Notes the steps of `text`, the value of --profile; traces go to profile/ in `folder`.

    Raises: ConfigError when `text` is not A:B, or names steps outside `first`..`last`.
    """
    self._wanted, self._folder = steps_of(text, first, last), folder / FOLDER
    self._running, self._scratch = False, self._folder

  def __enter__(self) -> Profiler:
    return self

  def __exit__(self, *_: Any) -> None:
    self._stop()  # a run that stops early keeps the trace so far

  @contextlib.contextmanager
  def step(self, number: int, pending: Any) -> Iterator[None]:
    """Wraps the dispatch of step `number`, and starts the trace before the first requested step.

    `pending` are outputs of the step before, which is waited for so that it is not in the trace.
    """
    if number not in self._wanted:
      yield
      return
    if not self._running:
      jax.block_until_ready(pending)
      self._scratch = storage.of(self._folder).scratch(self._folder)
      jax.profiler.start_trace(self._scratch)
      self._running = True
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def after(self, number: int, metrics: Any) -> None:
    """Stops the trace once step `number`, the last requested one, has been computed.

    `metrics` are its outputs, which are waited for.
    """
    if self._running and number == self._wanted[-1]:
      jax.block_until_ready(metrics)
      self._stop()
      print(f"profile of steps {self._wanted[0]} to {number}: {self._folder}", flush=True)

  def _stop(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      storage.of(self._folder).upload(self._scratch, self._folder)
      self._running = False
