"""Locks a folder that one command writes, and tells a second command who holds the lock.

The lock is a file in the folder. It is created exclusively, which is atomic on local disks, on NFS
from version 3, in buckets and on mounted ones, and it is rewritten every BEAT seconds. On the host that
wrote it, the process table says whether the owner is alive. On any other host, as after a
preemption, the newcomer watches the file for at most PATIENCE seconds. A lock that changes is in
use; one that does not is dead and is taken over. `flock` is not used, because NFS and FUSE mounts
keep it to one host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from llava_sp_jax import storage
from llava_sp_jax.errors import LlavaSPError

FILE = "lock.json"
BEAT = 15.0  # seconds between two beats
PATIENCE = 90.0  # seconds; NFS clients may show a file as it was up to 60 s ago
TORN = 2.0  # seconds until an unreadable lock file counts as dead
SIZE = 1024  # bytes of the file; each beat rewrites all of it in place


class LockError(LlavaSPError, RuntimeError):
  """Raised for a folder that another process writes; the message names host and process."""


@dataclasses.dataclass(frozen=True)
class Owner:
  """Identifies the process that holds a lock, so that others on its host can tell if it runs."""

  command: str
  host: str
  process: int
  started: str  # the kernel's start time of the process, because process ids are reused
  boot: str  # boot id of the kernel, and the process's PID namespace (containers have their own)
  since: str
  token: str

  @classmethod
  def here(cls, command: str) -> Owner:
    """Returns the owner for this process; `command` is what it runs, for messages."""
    number = os.getpid()
    return cls(
      command,
      socket.gethostname(),
      number,
      _started(number),
      _boot(),
      time.strftime("%Y-%m-%d %H:%M:%S %Z"),
      secrets.token_hex(8),
    )

  def alive(self) -> bool | None:
    """Returns whether the owner's process runs; None on a host that cannot tell."""
    if not self.boot or self.boot != _boot():
      return None
    try:
      os.kill(self.process, 0)
    except ProcessLookupError:
      return False
    except PermissionError:
      pass  # another user's, but alive
    return _started(self.process) == self.started

  def __str__(self) -> str:
    return f"{self.command} (process {self.process} on {self.host}, since {self.since})"


class Lock(contextlib.AbstractContextManager["Lock"]):
  """Holds the lock of `folder` while its block runs; `command` is named in messages of others.

  The folder is created if need be, and removed at the end if it was created and stayed empty.
  """

  def __init__(self, folder: Path, command: str):
    self._folder, self._path, self._store = folder, folder / FILE, storage.of(folder)
    self._owner, self._beats = Owner.here(command), 0
    self._done = threading.Event()
    self._thread: threading.Thread | None = None
    self._made: list[Path] = []  # folders that this lock has created
    self._guard = (0, 0.0)  # (time that the awaited guard was made, start of the wait)
    self.lost = ""  # who has taken the lock over while this process was suspended

  def __enter__(self) -> Lock:
    """Raises LockError when another process has the lock."""
    self._made = self._store.make(self._folder)
    try:
      while not self._store.create(self._path, self._content()):
        if dead := self._dead():
          self._take_over(dead)
    except BaseException:
      self._tidy()
      raise
    self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._done.set()
    if self._thread:
      self._thread.join(BEAT)
    if read(self._folder) == self._owner:
      self._path.unlink(missing_ok=True)
    self._tidy()

  @property
  def token(self) -> str:
    """Returns what no other lock has."""
    return self._owner.token

  def check(self) -> None:
    """Raises LockError when another process has taken the lock over; the caller must stop."""
    if self.lost:
      raise LockError(
        f"{self._folder}: this process stood still for so long that the folder was taken over by "
        f"{self.lost}; nothing more is written"
      )

  def _content(self) -> bytes:
    values = {**dataclasses.asdict(self._owner), "beats": self._beats}
    return json.dumps(values, indent=1).encode().ljust(SIZE - 1) + b"\n"

  def _dead(self) -> _Seen | None:
    """Returns the existing lock if nobody holds it; None when it disappears meanwhile.

    Raises: LockError when its owner is alive.
    """
    seen = self._looked()
    began, told = time.monotonic(), False
    while seen:
      alive = seen.owner.alive() if seen.owner else None
      if seen.owner and alive is not None:
        if alive:
          raise LockError(_used(self._folder, seen.owner))
        return seen
      if time.monotonic() - began > (PATIENCE if seen.owner else TORN):
        return seen
      if seen.owner and not told:
        told = True
        print(
          f"{self._folder}: locked by {seen.owner}, which this host cannot see; looking for up "
          f"to {PATIENCE:.0f} s whether it is alive",
          flush=True,
        )
      time.sleep(min(BEAT, TORN) / 4)
      asked = time.monotonic()
      now = self._looked()
      began += time.monotonic() - asked  # while nothing can be read, nobody can beat
      if now and now.owner and seen.owner and (now.owner, now.beats) != (seen.owner, seen.beats):
        raise LockError(_used(self._folder, now.owner))
      if now is None or now.owner or not seen.owner:  # a beat may be half written
        began = time.monotonic() if now and not now.owner and now != seen else began
        seen = now
    return None

  def _looked(self) -> _Seen | None:
    """Reads the lock file; None without one. An error says nothing of its owner, so it is read again.

    Raises: LockError when it cannot be read for PATIENCE seconds, or by this user at all.
    """
    began = time.monotonic()
    while True:
      try:
        return _look(self._path)
      except OSError as error:
        lasting = isinstance(error, PermissionError | IsADirectoryError)
        if lasting or time.monotonic() - began > PATIENCE:
          raise LockError(
            f"{self._path}: cannot be read ({error}), so nobody can tell whether the folder is in "
            "use; if no process writes it, remove that file, and start again"
          ) from None
      time.sleep(min(BEAT, TORN) / 4)

  def _take_over(self, dead: _Seen) -> None:
    """Removes a dead lock under a guard file, so that only one newcomer does it at a time.

    A newcomer whose turn comes later sees a changed lock and leaves it.
    """
    guard = self._path.with_name(f"{FILE}.next")
    if not self._store.create(guard, b""):
      time.sleep(TORN / 10)
      with contextlib.suppress(OSError):  # its owner may just have removed it
        if self._is_stale(self._store.changed(guard)):
          guard.unlink()
      return
    try:
      if self._looked() == dead:
        self._path.unlink()
        if dead.owner:
          print(
            f"{self._folder}: the lock of {dead.owner} was left behind and is taken over",
            flush=True,
          )
    finally:
      guard.unlink(missing_ok=True)

  def _is_stale(self, made: int) -> bool:
    """Returns whether the guard file made at `made` (ns) was left by a dead process.

    That is so when the file is old, or was watched for long enough. Its time may come from another
    machine or a clock that was reset, so it may lie in the future.
    """
    if self._guard[0] != made:
      self._guard = made, time.monotonic()
    waited = max(time.time() - made / 1e9, time.monotonic() - self._guard[1])
    return waited > 2 * PATIENCE

  def _beat(self) -> None:
    while not self._done.wait(BEAT):
      with contextlib.suppress(OSError):  # a disk may be unavailable for a while
        owner = read(self._folder)
        if owner and owner != self._owner:
          self.lost = str(owner)
          return
        self._beats += 1
        self._store.overwrite(self._path, self._content())

  def _tidy(self) -> None:
    for folder in self._made:
      with contextlib.suppress(OSError):  # it may not be empty any more
        folder.rmdir()


@dataclasses.dataclass(frozen=True)
class _Seen:
  """Holds a lock file as it was read; two unreadable ones differ by their files."""

  owner: Owner | None
  beats: int
  file: tuple[int, int]  # what differs when the file is written again


def read(folder: Path) -> Owner | None:
  """Returns the owner of the lock of a folder; None without a lock that can be read."""
  seen = _look_or_none(folder / FILE)
  return seen.owner if seen else None


def beats(folder: Path) -> int | None:
  """Returns how often the owner of the lock of a folder has rewritten it; None without one."""
  seen = _look_or_none(folder / FILE)
  return seen.beats if seen and seen.owner else None


def shows(folder: Path, token: str) -> bool:
  """Returns whether a folder has the lock with `token`, as soon as it is seen there.

  Waits for it for at most PATIENCE seconds: another process has just made it, and a network disk may
  show it late.
  """
  began = time.monotonic()
  while not ((owner := read(folder)) and owner.token == token):
    if time.monotonic() - began > PATIENCE:
      return False
    time.sleep(min(BEAT, TORN) / 4)
  return True


def _look_or_none(path: Path) -> _Seen | None:
  with contextlib.suppress(OSError):  # a folder, or an unavailable disk
    return _look(path)
  return None


def _look(path: Path) -> _Seen | None:
  """Reads a lock file; None without one. Raises: OSError when it cannot be read."""
  seen = storage.of(path).look(path)
  if seen is None:
    return None
  try:
    values = json.loads(seen.content)
    beats = int(values.pop("beats"))
    owner = Owner(**values)
  except (ValueError, TypeError, KeyError, AttributeError):
    return _Seen(None, 0, seen.version)
  whole = isinstance(owner.process, int) and owner.process > 0
  return _Seen(owner if whole else None, beats if whole else 0, seen.version)


def _used(folder: Path, owner: Owner) -> str:
  return (
    f"{folder}: in use by {owner}; wait until it ends or stop it, or name another folder "
    f"(its lock is {folder / FILE})"
  )


def _started(number: int) -> str:
  """Returns the start time of a process in kernel ticks; "" if it has ended or is unknown."""
  try:
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return ""
  return "" if fields[0] in "ZX" else fields[19]


def _boot() -> str:
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:  # not Linux: only the host's name is known
    return socket.gethostname()
