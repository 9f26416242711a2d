"""Passes notices between the processes of a run: stop, why one failed, and that all are to exit.

They are keys in JAX's coordination service, so they arrive where a collective would wait.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

import jax
from jax._src import distributed  # as Orbax does: nothing public reads the service's keys

POLL_SECONDS = 2.0  # between two polls of the other processes and of the clock
# Keys in JAX's coordination service: JAX's own, set when any process gets SIGTERM, and ours: why the
# run was aborted, and why the first process that fails is about to abort it.
NOTICE, ABORTED, FAILED = "RECEIVED_PREEMPTION_NOTICE", "llava_sp/aborted", "llava_sp/failed"


def asked_to_stop() -> bool:
  """Returns whether any process of this run has received SIGTERM; False for a single one."""
  return _said(NOTICE) is not None


def abort(what: str, code: int) -> None:
  """Exits this process at once with status `code`, and the others at their next poll (`Watchdog`).

  `what` says why, in the messages of all.
  """
  tell(what, code)
  say(f"{_me()} stops: {what}")
  leave(code)


def say(line: str) -> None:
  """Prints a line to stderr; does nothing if its disk is full, which must not keep a process alive."""
  with contextlib.suppress(OSError):
    print(f"llava-sp: {line}", file=sys.stderr, flush=True)


def tell(what: str, code: int) -> None:
  """Makes the other processes exit with status `code` at their next poll, and say that `what` is why.

  If several processes tell, the first one counts. Does nothing in a single process.
  """
  _set(ABORTED, f"{code} {jax.process_index()} {_me()}: {what}")


def note(what: str) -> None:
  """Tells the other processes why this one fails, for their own messages; they go on meanwhile.

  If several processes fail, the first one counts. Does nothing in a single process.
  """
  _set(FAILED, f"{jax.process_index()} {_me()}: {what}")


def failed_first() -> str | None:
  """Returns what another process has noted (`note`) before this one; None without one."""
  process, _, what = (_said(FAILED) or "").partition(" ")
  return what if process and int(process) != jax.process_index() else None


def _set(key: str, value: str) -> None:
  if jax.distributed.is_initialized():
    with contextlib.suppress(RuntimeError):  # another one was earlier, or the service is gone
      _client().key_value_set(key, value)


def _me() -> str:
  return f"process {jax.process_index()} of {jax.process_count()}"


def leave(code: int) -> None:
  """Exits this process at once with status `code`, without waiting for the others.

  Process 0 stays a little longer: its exit ends the service of the run, and the client of a process
  that still runs would crash that process.
  """
  with contextlib.suppress(OSError):
    sys.stdout.flush()
  if jax.process_count() > 1 and not jax.process_index():
    time.sleep(2 * POLL_SECONDS)
  os._exit(code)


def _said(key: str) -> str | None:
  """Returns the value that a process of this run has set for a key; None for a single process."""
  if not jax.distributed.is_initialized():
    return None
  try:
    return str(_client().key_value_try_get(key))
  except RuntimeError:  # the key is not set, or the service is gone
    return None


def _client() -> Any:
  return distributed.global_state.client
