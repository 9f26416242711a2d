"""Asks a running training for a trace of its next steps, through files in the run folder.

`profiles/request.json` names the profile, the steps, and the lock of the process that is asked, so
that no other process answers. Each process of the run polls for it, traces its next steps to
`profiles/NAME`, and writes `profiles/NAME/process-I.json` when its trace is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sp_jax import json_files, locks, storage
from llava_sp_jax.errors import LlavaSPError
from llava_sp_jax.files import FormatError

FOLDER, REQUEST = "profiles", "request.json"
POLL_SECONDS = 1.0  # between two looks of the training for a request
BUCKET_SECONDS = 10.0  # likewise in a bucket, where each look of each host is a request
LOOK_SECONDS = 0.2  # between two looks of the command for the answers
MOST = 100  # steps of a profile; each takes some megabytes a process


class ProfileError(LlavaSPError, RuntimeError):
  """Raised when no profile comes: nobody trains in the folder, or the training has ended."""


@dataclasses.dataclass(frozen=True)
class Request:
  """Names a profile, how many steps it has, and the token of the lock of the training."""

  name: str
  steps: int
  token: str


@dataclasses.dataclass(frozen=True)
class Answer:
  """Says which steps a process has traced, or why it could not, and how many processes trace."""

  first: int
  last: int
  processes: int
  error: str = ""


def ask(folder: Path, steps: int, say: Callable[[str], Any] = print) -> tuple[Path, Answer]:
  """Returns the folder with the trace of the next `steps` steps of the run in `folder`, once it is there.

  `say` prints what is waited for.

  Raises: ProfileError when no training runs there, it ends, or it cannot trace; LlavaSPError when
    another profile is asked for.
  """
  owner = locks.read(folder)
  if owner is None or owner.alive() is False:
    left = f"; the lock of {owner} was left behind" if owner else ""
    raise ProfileError(
      f"{folder}: no llava-sp train is running there{left}; give the --workdir of a run in progress"
    )
  if not owner.command.endswith("train"):
    raise ProfileError(f"{folder}: in use by {owner}, which makes no steps")
  place = folder / FOLDER
  file = place / REQUEST
  if (earlier := read(file)) and earlier.token == owner.token:
    raise ProfileError(
      f"{folder}: a profile is already asked for; wait for it, or remove {file} if nobody waits"
    )
  name = f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
  request = Request(name, steps, owner.token)
  storage.of(place).make(place)
  _write(file, request)
  say(f"{folder}: asked {owner} for a trace of its next {steps} steps; waiting until they are done")
  try:
    return place / name, _wait(folder, place / name, owner)
  finally:
    if read(file) == request:
      storage.of(file).remove(file)


def _wait(folder: Path, place: Path, owner: locks.Owner) -> Answer:
  """Returns the first answer once all processes have answered."""
  beats, beaten = locks.beats(folder), time.monotonic()
  while True:
    holds = locks.read(folder) == owner and owner.alive() is not False
    found = [answer for file in sorted(place.glob("process-*.json")) if (answer := _answer(file))]
    for answer in found:
      if answer.error:
        raise ProfileError(f"{folder}: the training could not trace its steps: {answer.error}")
    if found and len(found) >= found[0].processes:
      return found[0]
    if (now := locks.beats(folder)) != beats:
      beats, beaten = now, time.monotonic()
    if not holds or time.monotonic() - beaten > locks.PATIENCE:
      raise ProfileError(f"{folder}: {owner} ended before its trace was complete")
    time.sleep(LOOK_SECONDS)


def _write(file: Path, value: Request | Answer) -> None:
  storage.of(file).put(file, (json.dumps(dataclasses.asdict(value)) + "\n").encode())


def read(file: Path) -> Request | None:
  """Returns the request in a file; None without one that can be read."""
  with contextlib.suppress(FormatError, TypeError, OSError):
    request = Request(**_object(file))
    if isinstance(request.steps, int) and Path(str(request.name)).name == request.name:
      return request
  return None


def _answer(file: Path) -> Answer | None:
  with contextlib.suppress(FormatError, TypeError, OSError):
    return Answer(**_object(file))
  return None


def _object(file: Path) -> dict[str, Any]:
  return json_files.parse_object(storage.of(file).content(file), str(file))


def answer(folder: Path, request: Request, process: int, said: Answer) -> None:
  """Writes the answer of a process of the run in `folder`; a disk that is full is not an error."""
  with contextlib.suppress(OSError):
    place = folder / FOLDER / request.name
    storage.of(place).make(place)
    _write(place / f"process-{process}.json", said)


class Requests(contextlib.AbstractContextManager["Requests"]):
  """Looks for requests to the run in `folder` while its block runs, in a thread of its own."""

  def __init__(self, folder: Path):
    self._folder, self._done = folder, threading.Event()
    self._pause = BUCKET_SECONDS if storage.remote(folder) else POLL_SECONDS
    self._waiting: Request | None = None
    self._seen: set[str] = set()

  def __enter__(self) -> Requests:
    threading.Thread(target=self._poll, name="profiles", daemon=True).start()
    return self

  def __exit__(self, *_: Any) -> None:
    self._done.set()

  def peek(self) -> Request | None:
    """Returns the request that waits for an answer, or None."""
    return self._waiting

  def take(self) -> None:
    """Notes that the waiting request is being answered."""
    self._waiting = None

  def _poll(self) -> None:
    while not self._done.wait(self._pause):
      request = read(self._folder / FOLDER / REQUEST)
      if request is None or request.name in self._seen:
        continue
      self._seen.add(request.name)
      owner = locks.read(self._folder)
      if owner and owner.token == request.token and 0 < request.steps <= MOST:
        self._waiting = request
