"""Reading and writing the files of benchmarks: an error names the file, the place and what to do."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SHOWN = 5  # problems of one file that an error tells

Row = dict[str, Any]


class BenchmarkError(ValueError):
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


def read_json(path: Path, expected: type = dict) -> Any:
  """The JSON of a file. Raises: BenchmarkError when it is broken or of another type."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise BenchmarkError(f"{path}: not JSON ({error}); fetch the file again") from None
  if not isinstance(value, expected):
    raise BenchmarkError(
      f"{path}: expected a JSON {expected.__name__}, found {type(value).__name__}"
    )
  return value


def read_lines(path: Path, keys: Sequence[str]) -> list[Row]:
  """Rows of a file of JSON lines, each with `keys`. Blank lines are skipped.

  Raises: BenchmarkError that tells the first problems, with their lines, and how many there are.
  """
  rows, problems = [], []
  for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except ValueError as error:
      problems.append(f"line {number}: not JSON ({error})")
      continue
    if not isinstance(row, dict) or (absent := [key for key in keys if key not in row]):
      found = f"without {', '.join(absent)}" if isinstance(row, dict) else "no object"
      problems.append(f"line {number}: {found}")
    else:
      rows.append(row)
  _refuse(path, problems, f"JSON lines with {', '.join(keys)}")
  if not rows:
    raise BenchmarkError(f"{path}: empty; expected JSON lines with {', '.join(keys)}")
  return rows


def check_rows(path: Path, rows: Iterable[tuple[str, Any]], keys: Sequence[str]) -> None:
  """(name, row) pairs must be objects with `keys`. Raises: BenchmarkError with all that are not."""
  problems = []
  for name, row in rows:
    absent = keys if not isinstance(row, dict) else [key for key in keys if key not in row]
    if absent:
      problems.append(f"{name}: without {', '.join(absent)}")
  _refuse(path, problems, f"entries with {', '.join(keys)}")


def read_tsv(path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
  """Rows of a tab-separated file with a header, fields of any length (MMBench keeps images in it).

  Raises: BenchmarkError for a header without `keys` or lines of another width.
  """
  csv.field_size_limit(sys.maxsize)
  with path.open(encoding="utf-8-sig", newline="") as file:
    reader = csv.DictReader(file, delimiter="\t")
    header = reader.fieldnames or []
    if absent := [key for key in keys if key not in header]:
      raise BenchmarkError(
        f"{path}: no column {', '.join(absent)}; found {', '.join(header) or 'nothing'}"
      )
    rows = list(reader)
  problems = [
    f"row {number}: {'more' if None in row else 'fewer'} fields than the header"
    for number, row in enumerate(rows, 1)
    if None in row or None in row.values()
  ]
  _refuse(path, problems, f"{len(header)} tab-separated fields a row")
  return rows


def _refuse(path: Path, problems: list[str], expected: str) -> None:
  if problems:
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    raise BenchmarkError(
      f"{path}: expected {expected}; {'; '.join(problems[:SHOWN])}{more}. Fetch the file again."
    )


def write_json(path: Path, value: Any, indent: int | None = None) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(value, indent=indent))
  return path


def write_lines(path: Path, rows: Iterable[Row]) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path
