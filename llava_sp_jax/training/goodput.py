"""Accounts for every second of a run, over all of its starts: what trained, and what did not.

A clock is in exactly one category at any time, so the categories add up to the time since the run
first began. `goodput.json` in the run folder has a record of each start. A thread rewrites it every
few seconds, and the next start reads it: what was trained after the step that it resumes from is
lost, and between the last beat of a start and the next start the run was waiting.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from llava_sp_jax import storage
from llava_sp_jax.files import FormatError
from llava_sp_jax.json_files import parse_object

FILE = "goodput.json"
# (category, what its seconds went into); the share of the first is the goodput.
CATEGORIES: tuple[tuple[str, str], ...] = (
  ("step", "training steps"),
  ("start", "imports, joining the other processes, opening data and weights"),
  ("compile", "compiling the step, or reading it from a file"),
  ("restore", "reading the checkpoint"),
  ("input", "waiting for data while the devices are idle"),
  ("save", "standing still for a checkpoint, and the end of the run"),
  ("evaluation", "validation, and benchmarks between steps"),
  ("lost", "steps that a later start trained again"),
  ("waiting", "no process of the run was alive"),
)
NAMES = tuple(name for name, _ in CATEGORIES)
WORK = ("step", "input", "save", "evaluation")  # lost, if the steps are trained again
BEATS, SHORTEST, LONGEST = 400, 0.1, 15.0  # beats in the time so far; seconds between two of them
BUCKET = 2.0  # seconds between two in a bucket, where an object takes about one write a second
MARKS = 64  # saved steps that a record remembers
BRIEF = 3  # of those that are kept on the disks of the hosts

Seconds = dict[str, float]


def wall() -> float:
  """Returns the seconds since the epoch; within a process they never jump."""
  return _EPOCH + time.monotonic()


_EPOCH = time.time() - time.monotonic()


def process_age() -> float:
  """Returns the seconds since this process was started; 0 on systems that do not tell."""
  try:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
  except (OSError, ValueError, AttributeError):
    return 0.0


@dataclasses.dataclass
class Start:
  """Records one start of a run: when it began and was last alive, and its seconds by category.

  `marks` are (step, seconds by category when it was saved); the first is the step that the start
  resumed from.
  """

  begun: float
  seen: float
  seconds: Seconds
  marks: list[tuple[int, Seconds]] = dataclasses.field(default_factory=list)

  def lose(self, step: int) -> None:
    """Moves the work after `step`, from which a later start resumes, to the category `lost`.

    If `step` has no mark, the work after the newest mark before it is moved.
    """
    if not self.marks:
      return  # no step was begun
    self.marks = [m for m in self.marks if m[0] <= step] or [(step, self.marks[0][1])]
    kept = self.marks[-1][1]
    for name in WORK:
      self.seconds["lost"] += self.seconds[name] - kept[name]
      self.seconds[name] = kept[name]


def read(folder: Path) -> list[Start]:
  """Returns the starts of the run in `folder`, as they were last written; [] without a file.

  Raises: FormatError for a file that is not such a record.
  """
  path = folder / FILE
  content = storage.of(path).content(path)
  if not content:
    return []
  found = parse_object(content, str(path))
  try:
    return [
      Start(
        float(start["begun"]),
        float(start["seen"]),
        {name: float(start["seconds"][name]) for name in NAMES},
        [(int(n), {c: float(s[c]) for c in WORK}) for n, s in start["marks"]],
      )
      for start in found["starts"]
    ]
  except (KeyError, TypeError, ValueError) as error:
    raise FormatError(f"{path}: not a record of starts ({error!r})") from None


def totals(starts: list[Start]) -> Seconds:
  """Returns the seconds of a run by category; they add up to the time from first to last."""
  total = {name: sum(start.seconds[name] for start in starts) for name in NAMES}
  pairs = itertools.pairwise(starts)
  total["waiting"] += sum(max(0.0, later.begun - earlier.seen) for earlier, later in pairs)
  return total


class Clock(contextlib.AbstractContextManager["Clock"]):
  """Measures this start of a run; the process that keeps the record calls `keep`.

  Only the thread that trains changes the category.
  """

  def __init__(self, age: float = 0.0, now: Callable[[], float] = wall):
    """Begins in the category `start`, `age` seconds ago, when the process was started.

    `now` returns seconds since the epoch.
    """
    self.now, self._category = now, NAMES[1]
    self._since = now() - age
    self._start = Start(self._since, self._since, dict.fromkeys(NAMES, 0.0))
    self._before: list[Start] = []
    self._brief: list[int] = []  # steps that are soon replaced
    self._file: Path | None = None
    self._shortest = SHORTEST
    self._lock, self._wake, self._done = threading.RLock(), threading.Event(), False
    self._thread: threading.Thread | None = None

  def enter(self, category: str) -> None:
    """Counts the time from now on to `category`."""
    self.move(0.0, category)
    self._category = category

  @contextlib.contextmanager
  def of(self, category: str) -> Iterator[None]:
    """Counts the time of the block to `category`."""
    before = self._category
    self.enter(category)
    try:
      yield
    finally:
      self.enter(before)

  def move(self, seconds: float, category: str) -> None:
    """Counts the latest `seconds` of the present category to another one."""
    with self._lock:
      self._settle()
      self._start.seconds[self._category] -= seconds
      self._start.seconds[category] += seconds

  def _settle(self) -> None:
    now = self.now()
    self._start.seconds[self._category] += now - self._since
    self._since = self._start.seen = now

  def keep(self, folder: Path) -> None:
    """Reads the earlier starts of the run in `folder`, and begins to write this one beside them.

    A second call does nothing. A record that cannot be read is reported and begun anew.
    """
    if self._file:
      return
    self._file = folder / FILE
    self._shortest = BUCKET if storage.remote(folder) else SHORTEST
    try:
      self._before = read(folder)
    except FormatError as error:
      print(f"{error}; the seconds of earlier starts are not counted", flush=True)
    if self._before:  # whose clock may be another host's
      early = max(0.0, self._before[-1].seen - self._start.begun)
      self._start.begun += early
      self._start.seconds["start"] -= early
    self._thread = threading.Thread(target=self._beat, name="goodput", daemon=True)
    self._thread.start()

  def resumed(self, step: int) -> None:
    """Notes that training resumes from `step`: what earlier starts did after it is lost."""
    with self._lock:
      for start in self._before:
        start.lose(step)
    self.mark(step)

  def mark(self, step: int, brief: bool = False) -> None:
    """Notes that `step` is saved, so that the work until now is not lost with later steps.

    `brief` is for steps of which only the newest BRIEF are kept, so others need not be remembered.
    """
    with self._lock:
      self._settle()
      self._brief = [*self._brief, step] if brief else self._brief
      over, self._brief = self._brief[:-BRIEF], self._brief[-BRIEF:]
      marks = [m for m in self._start.marks if m[0] not in (step, *over)]
      marks.append((step, {name: self._start.seconds[name] for name in WORK}))
      self._start.marks = marks[:1] + marks[1:][-MARKS:]
    self._wake.set()

  def starts(self) -> list[Start]:
    """Returns the starts of the run, this one last, as they are now."""
    with self._lock:
      self._settle()
      return [*self._before, dataclasses.replace(self._start, seconds={**self._start.seconds})]

  def metrics(self) -> dict[str, float]:
    """Returns `goodput` and `badput/CATEGORY`, shares of the run so far; without those of zero."""
    found = totals(self.starts())
    whole = max(sum(found.values()), 1e-9)
    bad = {f"badput/{name}": found[name] / whole for name in NAMES[1:] if found[name] > 0}
    return {"goodput": found[NAMES[0]] / whole, **bad}

  def table(self) -> str:
    """Returns the seconds and shares of the run so far as a table, one line for each category."""
    starts = self.starts()
    found = totals(starts)
    whole = max(sum(found.values()), 1e-9)
    times = f"{len(starts)} start" + "s" * (len(starts) > 1)
    lines = [f"goodput {found[NAMES[0]] / whole:.1%} of {whole:,.1f} s in {times}"]
    for name, what in CATEGORIES:
      lines.append(f"  {name:<10} {found[name]:>12,.1f} s {found[name] / whole:>7.1%}  {what}")
    return "\n".join(lines)

  def _beat(self) -> None:
    while not self._done:
      self._write()
      age = self._start.seen - self._start.begun
      self._wake.wait(min(max(age / BEATS, self._shortest), LONGEST))
      self._wake.clear()

  def _write(self) -> None:
    with self._lock:
      text = json.dumps({"starts": [dataclasses.asdict(start) for start in self.starts()]})
    assert self._file
    with contextlib.suppress(OSError):  # a disk may be full or unavailable for a while
      storage.of(self._file).put(self._file, (text + "\n").encode())

  def __exit__(self, kind: Any, *_: Any) -> None:
    """Writes the record for the last time; without an error, the newest marked step is the last."""
    if kind is None and self._start.marks:
      self.mark(self._start.marks[-1][0])
    self._done = True
    self._wake.set()
    if self._thread:
      self._thread.join()
      self._write()


class Devices:
  """Notes when the devices have finished the newest step, in a thread that waits for them.

  A step is computed while the next batch is waited for; only what the wait takes longer is a loss.
  """

  def __init__(self, clock: Clock):
    self._clock, self._idle = clock, 0.0
    self._steps: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._begun = self._finished = 0  # steps; each number is written by one thread
    threading.Thread(target=self._follow, name="devices", daemon=True).start()

  def computes(self, metrics: Any) -> None:
    """Notes that a step with the outputs `metrics` has been dispatched."""
    self._begun += 1
    self._steps.put(metrics)

  @contextlib.contextmanager
  def input(self) -> Iterator[None]:
    """Counts the time of the block to `input`, from when the devices are idle."""
    before = self._clock.now()
    try:
      yield
    finally:
      if self._finished == self._begun:
        self._clock.move(max(0.0, self._clock.now() - max(before, self._idle)), "input")

  def __enter__(self) -> Devices:
    return self

  def __exit__(self, *_: Any) -> None:
    """Ends the thread once it has seen all steps."""
    self._steps.put(None)

  def _follow(self) -> None:
    while (metrics := self._steps.get()) is not None:
      with contextlib.suppress(Exception):  # of a step that failed; the loop reports it
        jax.block_until_ready(metrics)
      self._idle = self._clock.now()
      self._finished += 1
