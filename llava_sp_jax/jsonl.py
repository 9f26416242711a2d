"""Files of one JSON object a line: appended to, read, and cut off, whatever a kill or a disk left."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_sp_jax import folders
from llava_sp_jax.errors import LlavaSPError


def append(path: Path, record: Mapping[str, Any], start: str = "", **style: Any) -> None:
  """Adds one line in one write, behind the text `start`; `style` goes to `json.dumps`.

  Raises: OSError, also for what is no regular file.
  """
  _check(path)
  with folders.written(path), path.open("a") as file:
    file.write(start + json.dumps(dict(record), **style) + "\n")


def _check(path: Path) -> None:
  """Raises: OSError where no lines can be put there: opening a pipe would never end."""
  if os.path.lexists(path) and not (path.is_file() or path.is_char_device()):
    said = "expected a regular file; move away what is there"
    raise OSError(errno.EINVAL, said, str(path))


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
  """The objects of a file, none if there is no file; how many lines are none and were skipped.

  The end of a file without a newline is a line that a kill has cut off: it is neither.
  """
  if not path.is_file():
    return [], 0
  return objects(path.read_bytes().split(b"\n")[:-1])


def cut_after(path: Path, step: int) -> int:
  """Drops the records of later steps, and lines that cannot be read; returns how many of those.

  Records keep their bytes. The file is replaced when the new one is whole. Raises: OSError.
  """
  _check(path)
  if not path.is_file():
    return 0
  kept, bad = [], 0
  for line in path.read_bytes().split(b"\n")[:-1]:
    number = _step(line)
    if number is None:
      bad += 1
    elif number <= step:
      kept.append(line + b"\n")
  part = path.with_name(path.name + ".part")
  with folders.written(path):
    part.write_bytes(b"".join(kept))
    part.replace(path)
  return bad


def _step(line: bytes) -> int | None:
  try:
    number = json.loads(line)["step"]
  except (ValueError, RecursionError, KeyError, TypeError):
    return None
  return number if isinstance(number, int) else None


class LineError(LlavaSPError, ValueError):
  """A line that is no JSON; stands where its value would."""


def values(lines: Iterable[bytes | str]) -> Iterator[tuple[int, Any]]:
  """(number from 1, value) of the lines that are not blank, a LineError for one that is no JSON.

  What becomes of such a line is the reader's to say: refused, left out and counted, or told.
  """
  for number, line in enumerate(lines, 1):
    if line.strip():
      yield number, value_of(line)


def objects(lines: Iterable[bytes | str]) -> tuple[list[dict[str, Any]], int]:
  """The objects among the lines, and how many that are not blank hold none."""
  found = [value for _, value in values(lines)]
  records = [value for value in found if isinstance(value, dict)]
  return records, len(found) - len(records)


def value_of(text: bytes | str) -> Any:
  """What JSON says, or a LineError that says why it is none."""
  try:
    return json.loads(text)
  except RecursionError:
    return LineError("not JSON (nested too deeply)")
  except ValueError as error:
    return LineError(f"not JSON ({error})")
