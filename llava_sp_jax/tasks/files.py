"""Reads and writes files of benchmarks; errors name the file, the place in it, and what to do."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from llava_sp_jax import files as regular
from llava_sp_jax import jsonl
from llava_sp_jax.errors import LlavaSPError

SHOWN = 5  # problems of one file that an error lists
LARGEST = 1 << 36  # the most bytes of a file

Row = dict[str, Any]

# Key of a row -> the types of its value, in the files of all benchmarks.
TYPES: dict[str, tuple[type, ...]] = {
  **dict.fromkeys(("image", "text", "question", "category"), (str,)),
  **dict.fromkeys(("question_id", "id"), (str, int)),
}
_NAMES = {str: "a text", int: "a whole number"}


class BenchmarkError(LlavaSPError, ValueError):
  """Reports a benchmark's file that does not have the expected content."""


def first_of(folder: Path, names: Sequence[str]) -> Path | None:
  """Returns the path of the first of `names` that exists in `folder`; None if none does."""
  return next((folder / name for name in names if (folder / name).exists()), None)


def there(folder: Path, names: Iterable[str]) -> list[str]:
  """Returns those of `names` that exist in `folder`."""
  return [name for name in names if (folder / name).exists()]


def need(folder: Path, names: Iterable[str], source: str) -> None:
  """Checks that all of `names` exist in `folder`.

  Raises: FileNotFoundError that lists all missing files and where they come from (`source`).
  """
  if missing := [str(folder / name) for name in names if not (folder / name).exists()]:
    raise FileNotFoundError(f"no {', '.join(missing)}; {source}")


def refuse(path: Path, problems: list[str], expected: str) -> None:
  """Raises BenchmarkError if there are problems; it lists the first five and counts the others.

  `expected` says what the file should hold.
  """
  if problems:
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    raise BenchmarkError(
      f"{path}: expected {expected}; {'; '.join(problems[:SHOWN])}{more}. Fetch the file again."
    )


def is_text(value: Any) -> TypeGuard[str]:
  """Returns whether a value is a text that is not blank."""
  return isinstance(value, str) and bool(value.strip())


def read_text(path: Path) -> str:
  """Reads a UTF-8 file, with or without a byte order mark.

  Raises: BenchmarkError for another encoding; FormatError for what is not a regular file.
  """
  try:
    return regular.read(path, LARGEST).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise BenchmarkError(
      f"{path}: not UTF-8 text (byte {error.start}); fetch the file again"
    ) from None


def read_json(path: Path, expected: type = dict) -> Any:
  """Reads a JSON file whose value has the type `expected`: dict or list.

  Raises: BenchmarkError when it is not JSON or its value has another type.
  """
  value = jsonl.value_of(read_text(path))
  if isinstance(value, jsonl.LineError):
    raise BenchmarkError(f"{path}: {value}; fetch the file again")
  if not isinstance(value, expected):
    raise BenchmarkError(
      f"{path}: expected a JSON {expected.__name__}, found {type(value).__name__}"
    )
  return value


def read_lines(path: Path, keys: Sequence[str]) -> list[Row]:
  """Reads the objects of a JSON-lines file, each with `keys`; skips blank lines.

  Raises: BenchmarkError that lists the first problems with their lines, and counts the others.
  """
  rows = [(f"line {number}", row) for number, row in jsonl.values(read_text(path).split("\n"))]
  check_rows(path, rows, keys, f"JSON lines with {', '.join(keys)}")
  return [row for _, row in rows]


def read_truths(path: Path) -> list[Row]:
  """Reads the objects of a JSON-lines file of ground truths; a line that is none becomes {}.

  A question without its ground truth becomes an item with a problem, so a bad line costs no other.
  """
  rows = [row for _, row in jsonl.values(read_text(path).split("\n"))]
  return [row if isinstance(row, dict) else {} for row in rows]


def read_rows(path: Path) -> list[tuple[int, Any]]:
  """Reads the values of a JSON list or of JSON lines, with their numbers from 1; skips blank lines.

  Puts a LineError in the place of a line that is not JSON.

  Raises: BenchmarkError for a file without rows, or a list that is not JSON.
  """
  text = read_text(path)
  if text.lstrip().startswith("["):
    rows = list(enumerate(read_json(path, list), 1))
  else:
    rows = list(jsonl.values(text.split("\n")))
  if not rows:
    raise BenchmarkError(f"{path}: empty; expected a JSON list, or JSON lines")
  return rows


def check_rows(
  path: Path, rows: Sequence[tuple[str, Any]], keys: Sequence[str], expected: str = ""
) -> None:
  """Checks that the rows of (name, row) pairs are objects with `keys`, of the types of TYPES.

  `expected` says in messages what the file should hold ("": entries with these keys).

  Raises: BenchmarkError when some are not, or there are no rows.
  """
  expected = expected or f"entries with {', '.join(keys)}"
  refuse(path, [f"{name}: {why}" for name, row in rows if (why := misses(row, keys))], expected)
  if not rows:
    raise BenchmarkError(f"{path}: empty; expected {expected}")


def misses(row: Any, keys: Sequence[str]) -> str:
  """Returns why a row is not an object with `keys` of the types of TYPES; "" if it is one."""
  if isinstance(row, jsonl.LineError):
    return str(row)
  if not isinstance(row, dict):
    return "no object"
  if absent := [key for key in keys if key not in row]:
    return f"without {', '.join(absent)}"
  wrong = [key for key, kinds in TYPES.items() if key in row and not _is(row[key], kinds)]
  return "; ".join(
    f"{key} {row[key]!r:.40}, expected {' or '.join(_NAMES[kind] for kind in TYPES[key])}"
    for key in wrong
  )


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
  return isinstance(value, kinds) and not isinstance(value, bool)


def of_number(value: float) -> str | None:
  """Returns a number as text, a whole one without a period; None for a boolean, nan or infinity."""
  if isinstance(value, float):
    if not math.isfinite(value):
      return None
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else str(value)
  return None if isinstance(value, bool) else str(value)


def read_tsv(path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
  """Reads a tab-separated file with a header; fields may be of any length (MMBench's hold images).

  Raises: BenchmarkError for text that is not tab-separated UTF-8, a header without `keys`, and rows
    with more or fewer fields than the header.
  """
  csv.field_size_limit(sys.maxsize)
  raw: Any = regular.open_regular(path)
  with io.TextIOWrapper(io.BufferedReader(raw), encoding="utf-8-sig", newline="") as file:
    reader = csv.DictReader(file, delimiter="\t")
    try:
      header, rows = reader.fieldnames or [], list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
      raise BenchmarkError(
        f"{path}: not tab-separated UTF-8 text behind row {reader.line_num} ({error}); fetch the file "
        "again"
      ) from None
    if absent := [key for key in keys if key not in header]:
      raise BenchmarkError(
        f"{path}: no column {', '.join(absent)}; found {', '.join(header) or 'nothing'}"
      )
  problems = [
    f"row {number}: {'more' if None in row else 'fewer'} fields than the header"
    for number, row in enumerate(rows, 1)
    if None in row or None in row.values()
  ]
  refuse(path, problems, f"{len(header)} tab-separated fields a row")
  return rows


def write_json(path: Path, value: Any, indent: int | None = None) -> Path:
  """Writes `value` to a JSON file, creates its folder if needed, and returns the path.

  `indent` is that of `json.dumps`; None writes one line.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value, indent=indent))
  return path


def write_lines(path: Path, rows: Iterable[Row]) -> Path:
  """Writes a JSON-lines file, creates its folder if needed, and returns its path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path
