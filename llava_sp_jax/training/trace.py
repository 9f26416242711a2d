"""Writes an xplane trace of some steps, for xprof, TensorBoard's profiler or Perfetto."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax import storage
from llava_sp_jax.training import profiles

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


@dataclasses.dataclass
class _Trace:
  """Holds a trace: its steps, its folder, and the request that it answers, if it was asked for."""

  steps: range
  folder: Path
  scratch: Path  # a local folder, in which the profiler makes what belongs into `folder`
  request: profiles.Request | None = None
  running: bool = False
  last: int = 0  # the newest step in it


def _traced(steps: range, folder: Path, request: profiles.Request | None = None) -> _Trace:
  if jax.process_count() > 1:  # those of one host would write one file, named after the host
    folder = folder / f"process-{jax.process_index()}"
    storage.of(folder).make(folder)
  return _Trace(steps, folder, storage.of(folder).scratch(folder), request)


def _kept(trace: _Trace) -> None:
  """Stops the profiler, and takes what it has made to its place."""
  jax.profiler.stop_trace()
  storage.of(trace.folder).upload(trace.scratch, trace.folder)


class Profiler:
  """Traces the steps of --profile, and those that `llava-sp profile` asks for while the run trains.

  Each process writes the trace of its own devices.
  """

  def __init__(self, text: str, folder: Path, first: int, last: int):
    """Notes the steps of `text`, the value of --profile; traces go to profile/ in `folder`.

    `first` and `last` are the first and last step that the run will do.

    Raises: ConfigError when `text` is not A:B, or names steps outside `first`..`last`.
    """
    self._planned = steps_of(text, first, last)
    self._folder, self._last = folder, last
    self._requests = profiles.Requests(folder)
    self._trace: _Trace | None = None

  def __enter__(self) -> Profiler:
    self._requests.__enter__()
    return self

  def __exit__(self, *_: Any) -> None:
    self._requests.__exit__()
    self._stop()  # a run that stops early keeps the trace so far

  def _next(self, number: int) -> _Trace | None:
    """Returns the trace that begins with step `number`; None if none does."""
    if number in self._planned:
      return _traced(self._planned, self._folder / FOLDER)
    request = self._requests.peek()
    if request is None:
      return None
    steps = range(number, min(number + request.steps, self._last + 1))
    if set(steps) & set(self._planned):
      return None  # after those
    self._requests.take()
    return _traced(steps, self._folder / profiles.FOLDER / request.name, request)

  @contextlib.contextmanager
  def step(self, number: int, pending: Any) -> Iterator[None]:
    """Wraps the dispatch of step `number`, and starts a trace before the first requested step.

    `pending` are outputs of the step before, which is waited for so that it is not in the trace.
    """
    self._trace = trace = self._trace or self._next(number)
    if trace is None:
      yield
      return
    if not trace.running:
      jax.block_until_ready(pending)
      self._attempt(trace, lambda: jax.profiler.start_trace(trace.scratch))
      trace.running = self._trace is not None
    trace.last = number
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      yield

  def after(self, number: int, metrics: Any) -> None:
    """Stops the trace once step `number`, the last requested one, has been computed.

    `metrics` are its outputs, which are waited for.
    """
    trace = self._trace
    if trace and number == trace.steps[-1]:
      jax.block_until_ready(metrics)
      self._stop()
      print(f"profile of steps {trace.steps[0]} to {number}: {trace.folder}", flush=True)

  def _stop(self) -> None:
    if (trace := self._trace) and trace.running:
      trace.running = False
      self._attempt(trace, lambda: _kept(trace))
      if self._trace:
        self._answer(trace)
    self._trace = None

  def _attempt(self, trace: _Trace, work: Callable[[], object]) -> None:
    """Calls `work`; an error ends a trace that was asked for, and not the run."""
    try:
      work()
    except Exception as error:  # any error of the profiler and of the disk
      if trace.request is None:
        raise
      self._answer(trace, (str(error).splitlines() or [type(error).__name__])[0][:200])
      self._trace = None

  def _answer(self, trace: _Trace, error: str = "") -> None:
    if trace.request:
      said = profiles.Answer(trace.steps[0], trace.last, jax.process_count(), error)
      profiles.answer(self._folder, trace.request, jax.process_index(), said)
