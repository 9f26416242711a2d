"""Reading and writing the files of benchmarks: an error names the file, the place and what to do."""

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

SHOWN = 5  # problems of one file that an error tells
LARGEST = 1 << 36  # bytes of a file

Row = dict[str, Any]

# What these keys of a question hold, in whatever benchmark's file.
TYPES: dict[str, tuple[type, ...]] = {
  **dict.fromkeys(("image", "text", "question", "category"), (str,)),
  **dict.fromkeys(("question_id", "id"), (str, int)),
}
_NAMES = {str: "a text", int: "a whole number"}


class BenchmarkError(LlavaSPError, ValueError):
  """A benchmark's file does not hold what its format promises."""


def first_of(folder: Path, names: Sequence[str]) -> Path | None:
  """The first of several places where people keep a file."""
  return next((folder / name for name in names if (folder / name).exists()), None)


def there(folder: Path, names: Iterable[str]) -> list[str]:
  """Those of the files that a folder holds."""
  return [name for name in names if (folder / name).exists()]


def need(folder: Path, names: Iterable[str], source: str) -> None:
  """Raises: FileNotFoundError that lists everything that is not there, and where it comes from."""
  if missing := [str(folder / name) for name in names if not (folder / name).exists()]:
    raise FileNotFoundError(f"no {', '.join(missing)}; {source}")


def refuse(path: Path, problems: list[str], expected: str) -> None:
  """Raises: BenchmarkError where there are problems: the first of them, and how many more."""
  if problems:
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    raise BenchmarkError(
      f"{path}: expected {expected}; {'; '.join(problems[:SHOWN])}{more}. Fetch the file again."
    )


def is_text(value: Any) -> TypeGuard[str]:
  """Whether a value is a text that says something: what a truth is compared with is one."""
  return isinstance(value, str) and bool(value.strip())


def read_text(path: Path) -> str:
  """The text of a regular UTF-8 file. Raises: BenchmarkError for another encoding, FormatError."""
  try:
    return regular.read(path, LARGEST).decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise BenchmarkError(
      f"{path}: not UTF-8 text (byte {error.start}); fetch the file again"
    ) from None


def read_json(path: Path, expected: type = dict) -> Any:
  """The JSON of a file. Raises: BenchmarkError when it is broken or of another type."""
  value = jsonl.value_of(read_text(path))
  if isinstance(value, jsonl.LineError):
    raise BenchmarkError(f"{path}: {value}; fetch the file again")
  if not isinstance(value, expected):
    raise BenchmarkError(
      f"{path}: expected a JSON {expected.__name__}, found {type(value).__name__}"
    )
  return value


def read_lines(path: Path, keys: Sequence[str]) -> list[Row]:
  """Rows of a file of JSON lines, each with `keys`. Blank lines are skipped.

  Raises: BenchmarkError that tells the first problems, with their lines, and how many there are.
  """
  rows = [(f"line {number}", row) for number, row in jsonl.values(read_text(path).split("\n"))]
  check_rows(path, rows, keys, f"JSON lines with {', '.join(keys)}")
  return [row for _, row in rows]


def read_truths(path: Path) -> list[Row]:
  """Rows of a file of JSON lines as they stand, {} for one that is none: it tells no truth, and
  what has none is left out by name."""
  rows = [row for _, row in jsonl.values(read_text(path).split("\n"))]
  return [row if isinstance(row, dict) else {} for row in rows]


def read_rows(path: Path) -> list[tuple[int, Any]]:
  """(number from 1, value) of a JSON list, or of the lines of JSON lines; blank lines are skipped.

  A line that is no JSON is a LineError in the row's place. Raises: BenchmarkError for a file
  without rows.
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
  """(name, row) pairs must be objects with `keys`, of the types of TYPES.

  Raises: BenchmarkError with all that are not, or that there is none.
  """
  expected = expected or f"entries with {', '.join(keys)}"
  refuse(path, [f"{name}: {why}" for name, row in rows if (why := misses(row, keys))], expected)
  if not rows:
    raise BenchmarkError(f"{path}: empty; expected {expected}")


def misses(row: Any, keys: Sequence[str]) -> str:
  """Why a row is none with `keys`; empty where it is one."""
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
  """A number as people write it, whole ones without a period; None for what is none."""
  if isinstance(value, float):
    if not math.isfinite(value):
      return None
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else str(value)
  return None if isinstance(value, bool) else str(value)


def read_tsv(path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
  """Rows of a tab-separated file with a header, fields of any length (MMBench keeps images in it).

  Raises: BenchmarkError for what is no such text, a header without `keys`, lines of another width.
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
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value, indent=indent))
  return path


def write_lines(path: Path, rows: Iterable[Row]) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path
