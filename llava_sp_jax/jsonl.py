"""Appends to, reads and cuts off files of one JSON object a line.

Lines that a kill or a broken disk has damaged are skipped.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_sp_jax import storage
from llava_sp_jax.errors import LlavaSPError


def append(path: Path, record: Mapping[str, Any], start: str = "", **style: Any) -> None:
  """Appends `start` and one line of JSON to a file, in one write; `style` goes to `json.dumps`.

  In a bucket, the line waits in memory for `storage` to put it there.

  Raises: OSError when it cannot be written, or is anything but a regular file.
  """
  _check(path)
  storage.of(path).append(path, (start + json.dumps(dict(record), **style) + "\n").encode())


def _check(path: Path) -> None:
  """Raises OSError for anything but a regular file or device: opening a pipe would block."""
  if os.path.lexists(path) and not (path.is_file() or path.is_char_device()):
    said = "expected a regular file; move away what is there"
    raise OSError(errno.EINVAL, said, str(path))


def read(path: Path) -> tuple[list[dict[str, Any]], int]:
  """Returns the objects of a file, and the number of other lines, which are skipped.

  A missing file has no lines. A last line without a newline was cut off by a kill and counts as
  neither.
  """
  return objects(storage.of(path).content(path).split(b"\n")[:-1])


def cut_after(path: Path, step: int) -> int:
  """Drops the records whose "step" is above `step`, and all unreadable lines.

  Returns the number of unreadable lines. The other records keep their bytes. The file is replaced
  when the new one is complete.

  Raises: OSError when it cannot be read or written.
  """
  _check(path)
  if not (content := storage.of(path).content(path)):
    return 0
  kept, bad = [], 0
  for line in content.split(b"\n")[:-1]:
    number = _step(line)
    if number is None:
      bad += 1
    elif number <= step:
      kept.append(line + b"\n")
  storage.of(path).put(path, b"".join(kept))
  return bad


def _step(line: bytes) -> int | None:
  try:
    number = json.loads(line)["step"]
  except (ValueError, RecursionError, KeyError, TypeError):
    return None
  return number if isinstance(number, int) else None


class LineError(LlavaSPError, ValueError):
  """Stands in place of the value of a line that is not JSON."""


def values(lines: Iterable[bytes | str]) -> Iterator[tuple[int, Any]]:
  """Yields (line number from 1, value) for the lines that are not blank.

  The value of a line that is not JSON is a LineError. The caller decides whether to refuse, skip or
  report it.
  """
  for number, line in enumerate(lines, 1):
    if line.strip():
      yield number, value_of(line)


def objects(lines: Iterable[bytes | str]) -> tuple[list[dict[str, Any]], int]:
  """Returns the objects among the lines, and the number of other lines that are not blank."""
  found = [value for _, value in values(lines)]
  records = [value for value in found if isinstance(value, dict)]
  return records, len(found) - len(records)


def value_of(text: bytes | str) -> Any:
  """Parses JSON, or returns a LineError that says why it is not JSON."""
  try:
    return json.loads(text)
  except RecursionError:
    return LineError("not JSON (nested too deeply)")
  except ValueError as error:
    return LineError(f"not JSON ({error})")
