"""A lock on a folder that one command writes: a second one is told which process on which host has it.

The lock is a file in the folder. It is created exclusively, which is atomic on local disks, on NFS
from version 3 and on mounted buckets, and it is rewritten every BEAT seconds. On the host that
wrote it, the process table says whether the owner is alive. On any other host, as after a preemption,
the newcomer watches the file for at most PATIENCE seconds: a lock that changes is in use, one that
stands still is dead and is taken over. `flock` is not used: NFS and FUSE mounts keep it to one host.
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

FILE = "lock.json"
BEAT = 15.0  # seconds between two beats
PATIENCE = 90.0  # seconds; NFS clients may show a file as it was up to 60 s ago
TORN = 2.0  # seconds until a file that cannot be read counts as a lock of nobody
SIZE = 1024  # bytes of the file: each beat writes it whole, in place


class LockError(RuntimeError):
  """A folder that another process writes; the message names host and process."""


@dataclasses.dataclass(frozen=True)
class Owner:
  """A process, named so that another one on the same host can say whether it still runs."""

  command: str
  host: str
  process: int
  started: str  # the kernel's start time of the process: numbers are used again
  boot: str  # of the kernel, and the numbering that the process is in (containers have their own)
  since: str
  token: str

  @classmethod
  def here(cls, command: str) -> Owner:
    number = os.getpid()
    return cls(command, socket.gethostname(), number, _started(number), _boot(),
               time.strftime("%Y-%m-%d %H:%M:%S %Z"), secrets.token_hex(8))  # fmt: skip

  def alive(self) -> bool | None:
    """Whether the process runs; None where only its own host could say."""
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


class Lock(contextlib.AbstractContextManager):
  """Holds the lock of `folder`, which is made if need be, and goes again if nothing was put there."""

  def __init__(self, folder: Path, command: str):
    self._folder, self._path = folder, folder / FILE
    self._owner, self._beats = Owner.here(command), 0
    self._done = threading.Event()
    self._thread: threading.Thread | None = None
    self._made: list[Path] = []  # folders that were not there before
    self.lost = ""  # who has taken it over, while this process stood still

  def __enter__(self) -> Lock:
    """Raises: LockError when another process has it."""
    missing = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
    self._folder.mkdir(parents=True, exist_ok=True)
    self._made = missing
    try:
      while not self._created():
        self._take_over(self._dead())
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
    owner, _beats = read(self._folder)
    if owner == self._owner:
      self._path.unlink(missing_ok=True)
    self._tidy()

  def check(self) -> None:
    """Raises: LockError when another process has taken the lock over."""
    if self.lost:
      raise LockError(
        f"{self._folder}: this process stood still for so long that the folder was taken over by "
        f"{self.lost}; nothing more is written"
      )

  def _content(self) -> bytes:
    values = {**dataclasses.asdict(self._owner), "beats": self._beats}
    return json.dumps(values, indent=1).encode().ljust(SIZE - 1) + b"\n"

  def _created(self) -> bool:
    try:
      place = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
      return False
    with os.fdopen(place, "wb") as file:
      file.write(self._content())
    return True

  def _dead(self) -> Owner | None:
    """The owner of the lock that is there, if it is dead. Raises: LockError when it is alive."""
    owner, seen = read(self._folder)
    began, told = time.monotonic(), False
    while True:
      alive = owner.alive() if owner else None
      if owner and alive is not None:
        if alive:
          raise LockError(_used(self._folder, owner))
        return owner
      waited = time.monotonic() - began
      if waited > (PATIENCE if owner else TORN) or not self._path.exists():
        return owner
      if owner and not told:
        told = True
        print(f"{self._folder}: locked by {owner}, which this host cannot see; looking for up to "
              f"{PATIENCE:.0f} s whether it is alive", flush=True)  # fmt: skip
      time.sleep(min(BEAT, TORN) / 4)
      now, beats = read(self._folder)
      if now and owner and (now, beats) != (owner, seen):
        raise LockError(_used(self._folder, now))
      if now:
        owner, seen = now, beats

  def _take_over(self, dead: Owner | None) -> None:
    """Moves the lock of `dead` away, and puts it back if another newcomer was quicker."""
    aside = self._path.with_name(f"{FILE}.{self._owner.token}")
    try:
      self._path.rename(aside)
    except FileNotFoundError:
      return
    found = _parsed(aside)[0]
    if found != dead:
      with contextlib.suppress(FileExistsError):
        os.link(aside, self._path)
    elif dead:
      print(f"{self._folder}: the lock of {dead} was left behind and is taken over", flush=True)
    aside.unlink()

  def _beat(self) -> None:
    while not self._done.wait(BEAT):
      with contextlib.suppress(OSError):  # a disk that is away for a while
        owner, _beats = read(self._folder)
        if owner and owner != self._owner:
          self.lost = str(owner)
          return
        self._beats += 1
        with self._path.open("r+b") as file:
          file.write(self._content())

  def _tidy(self) -> None:
    for folder in self._made:
      with contextlib.suppress(OSError):  # it has come into use
        folder.rmdir()


def read(folder: Path) -> tuple[Owner | None, int]:
  """Who has the lock of a folder, and its beats; (None, 0) without a lock that can be read."""
  return _parsed(folder / FILE)


def _parsed(path: Path) -> tuple[Owner | None, int]:
  try:
    values = json.loads(path.read_bytes())
    beats = int(values.pop("beats"))
    owner = Owner(**values)
  except (OSError, ValueError, TypeError, KeyError, AttributeError):
    return None, 0
  return (owner, beats) if isinstance(owner.process, int) and owner.process > 0 else (None, 0)


def _used(folder: Path, owner: Owner) -> str:
  return (
    f"{folder}: in use by {owner}; wait until it ends or stop it, or name another folder "
    f"(its lock is {folder / FILE})"
  )


def _started(number: int) -> str:
  """The start time of a process in ticks of the kernel; empty when it has ended or none is told."""
  try:
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
  except OSError:
    return ""
  return "" if fields[0] in "ZX" else fields[19]


def _boot() -> str:
  try:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  except OSError:  # not Linux: the host's name must do
    return socket.gethostname()
