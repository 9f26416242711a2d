"""Exits a process that failed or stalls, so that the others do not wait forever."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from llava_sp_jax import console
from llava_sp_jax.distributed.notices import (
  ABORTED,
  POLL_SECONDS,
  _said,
  failed_first,
  leave,
  note,
  say,
  tell,
)


class Watchdog(contextlib.AbstractContextManager["Watchdog"]):
  """Exits this process when it fails or stalls, so that the others do not wait forever.

  JAX ends the survivors of a process that *died* (`peer_seconds`). The watchdog handles the other
  two cases: an error in one process, whose exit would wait for all others, and a step that never
  ends although all processes are alive: after `stall_seconds` without a step, 0 for no limit. Both
  exit with a message and status 1. When one process has failed or aborted (`abort`), all others
  follow within POLL_SECONDS. A single process raises its errors as usual.
  """

  def __init__(self, stall_seconds: float, leave: Callable[[int], Any] = leave):
    self._stall, self._leave, self._step = stall_seconds, leave, 0
    self._last: float | None = None
    self._done = threading.Event()

  def __enter__(self) -> Watchdog:
    if self._stall > 0 or jax.process_count() > 1:
      threading.Thread(target=self._poll, name="watchdog", daemon=True).start()
    return self

  def beat(self, step: int) -> None:
    """Notes that `step` is done. The clock starts at the first call, because that step compiles."""
    self._step, self._last = step, time.monotonic()

  @contextlib.contextmanager
  def noting(self) -> Iterator[None]:
    """Notes at once why the block fails here: if the others then fail of it, they say so.

    They are not stopped yet, because what this process still completes, such as a checkpoint, may need
    them. That comes when the watchdog's own block ends.
    """
    try:
      yield
    except BaseException as error:
      note(_text(error))
      raise

  def _poll(self) -> None:
    while not self._done.wait(min(self._stall / 4 or POLL_SECONDS, POLL_SECONDS)):
      self._follow()
      if not self._stall:
        continue
      idle = 0.0 if self._last is None else time.monotonic() - self._last
      if idle > self._stall:
        self._end(f"no step since step {self._step}, {idle:.0f} s ago (train.stall_seconds)")

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
    self._done.set()
    if error is None or jax.process_count() == 1:
      return
    self._follow()  # the message of an abort says more than a broken connection
    if isinstance(error, KeyboardInterrupt):
      self._fail("interrupted")
      return
    if cause := failed_first():
      say(_text(error))
      self._fail(f"{cause} (that process failed first)")
      return
    if _ours(error):
      self._fail(_text(error))
      return
    with contextlib.suppress(OSError):
      traceback.print_exception(error)
    tell(_text(error), 1)
    self._end(
      f"failed after step {self._step} (above). If the error names a connection, another process "
      "died: see what that one printed. Started again, all resume from the last checkpoint"
    )

  def _fail(self, what: str) -> None:
    tell(what, 1)
    self._end(what)

  def _follow(self) -> None:
    """Exits with the status of another process that has aborted the run."""
    if said := _said(ABORTED):
      code, process, what = said.split(" ", 2)
      if int(process) != jax.process_index():
        self._end(what, int(code))

  def _end(self, what: str, code: int = 1) -> None:
    say(f"process {jax.process_index()} of {jax.process_count()} stops: {what}")
    self._leave(code)


def _ours(error: BaseException) -> bool:
  """Returns whether the message of an error says enough without a traceback."""
  return type(error).__module__.startswith("llava_sp_jax") or _full(error)


def _text(error: BaseException) -> str:
  text = console.error_line(error) if _ours(error) else f"{console.one_line(error):.300}"
  return f"{type(error).__name__}: {text}"


def _full(error: BaseException) -> bool:
  """Returns whether an error says that a disk takes no more data.

  Errors of connections are OSErrors, too, but say less about the cause.
  """
  return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
