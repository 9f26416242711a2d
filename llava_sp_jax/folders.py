"""Makes output folders, which must be absent, empty, or left unfinished by the same command.

Commands neither remove nor overwrite files that they did not make. While a folder is written, it
holds a lock (`locks`) and a mark that names the command. Both are removed when the folder is
complete. So a killed command can be run again, another command is refused, and so are two at once.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from llava_sp_jax import locks, storage
from llava_sp_jax.errors import LlavaSPError

MARK = "unfinished.json"
PART = ".part"  # suffix of a folder that is not complete


class FolderError(LlavaSPError, ValueError):
  """Raised for an output folder that a command would have to overwrite; names its content."""


def local(text: str | os.PathLike[str]) -> Path:
  """Returns the path of an output folder on a disk. Raises: FolderError for one in a bucket."""
  if storage.remote(text):
    raise FolderError(f"{text}: this can be written to a local folder only; name one")
  return Path(text)


@contextlib.contextmanager
def new(out: Path, command: str, makes: Sequence[str] = ()) -> Iterator[Path]:
  """Yields `out`, which may be written until the block ends; then it counts as complete.

  If a killed call of the same `command` left files, those named in `makes` are removed first. After
  an error the mark stays, so that the same command may write the folder again.

  Raises:
    FolderError: when `out` is a file, or holds anything that this command did not make.
    LockError: when another process writes it.
  """
  check(out, command)
  with locks.Lock(out, f"llava-sp {command}"):
    check(out, command)
    if _mark(out) is None:
      (out / MARK).write_text(json.dumps({"command": command}) + "\n")
    for name in makes:
      remove(out / name)
    try:
      yield out
    except BaseException:
      if not {path.name for path in out.iterdir()} - {MARK, locks.FILE}:
        (out / MARK).unlink()  # nothing was written
      raise
    (out / MARK).unlink()


@contextlib.contextmanager
def renamed(out: Path, command: str) -> Iterator[Path]:
  """Yields a folder beside `out` that is renamed to `out` when the block ends.

  After an error, its content is removed. `command` is named in messages, and in the mark of the
  unfinished folder.

  Raises:
    FolderError: when `out` or the folder beside it holds anything that this command did not make.
    LockError: when another process writes it.
  """
  check(out, "")
  part = out.with_name(out.name + PART)
  check(part, command)
  with locks.Lock(part, f"llava-sp {command}"):
    check(part, command)
    _empty(part)  # its mark says that a killed call of this command left it
    (part / MARK).write_text(json.dumps({"command": command}) + "\n")
    try:
      yield part
    except BaseException:
      _empty(part)
      raise
    (part / MARK).unlink()
    (part / locks.FILE).unlink(missing_ok=True)  # the complete folder holds only what was asked for
    check(out, "")
    if out.exists():
      out.rmdir()
    part.rename(out)


def check(out: Path, command: str) -> None:
  """Raises FolderError when `command` may not write `out`.

  It may if `out` is absent, empty, or left unfinished by the same command.
  """
  if not out.exists() and not os.path.islink(out):
    return
  if not out.is_dir():
    raise FolderError(f"{out}: exists and is no folder; name a new folder")
  held = sorted(path.name for path in out.iterdir() if path.name != locks.FILE)
  if not held:
    return
  mark = _mark(out)
  if mark == "" and held == [MARK]:  # a command was killed while it wrote the mark
    return
  if mark is None:
    shown = ", ".join(held[:3]) + (f" and {len(held) - 3} more" if len(held) > 3 else "")
    raise FolderError(f"{out}: exists and holds {shown}; name a new folder")
  if mark != command:
    raise FolderError(
      f"{out}: left unfinished by `llava-sp {mark}`; give that command again, or name a new folder"
    )


def remove(path: Path) -> None:
  """Removes a file or folder, if it exists."""
  storage.of(path).remove(path)


def _mark(out: Path) -> str | None:
  """Returns the command that has left `out` unfinished, "" for a damaged mark, None without one."""
  try:
    values = json.loads((out / MARK).read_text())
  except FileNotFoundError:
    return None
  except ValueError:
    return ""
  return str(values.get("command", "")) if isinstance(values, dict) else ""


def _empty(folder: Path) -> None:
  for path in folder.iterdir():
    if path.name != locks.FILE:
      remove(path)


def rename_aside(path: Path, place: Path) -> Path:
  """Moves `path` into the folder `place`, and returns its new path.

  It keeps its name if that is free; otherwise a number is added.
  """
  names = (path.name, *(f"{path.name}-{number}" for number in range(2, 1 << 16)))
  there = (place / name for name in names)
  free = next(path for path in there if not (path.exists() or os.path.lexists(path)))
  storage.of(path).move(path, free)
  return free


@contextlib.contextmanager
def written(path: Path) -> Iterator[None]:
  """Adds `path` to an OSError of the block, which often says only that a disk is full."""
  try:
    yield
  except OSError as error:
    raise OSError(error.errno, error.strerror or str(error), str(path)) from error
