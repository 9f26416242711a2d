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


def refuse(path: Path, problems: list[str], expected: str) -> None:
  """Raises: BenchmarkError where there are problems: the first of them, and how many more."""
  if problems:
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    raise BenchmarkError(
      f"{path}: expected {expected}; {'; '.join(problems[:SHOWN])}{more}. Fetch the file again."
    )


def read_text(path: Path) -> str:
  """The text of a UTF-8 file. Raises: BenchmarkError for another encoding."""
  try:
    return path.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    raise BenchmarkError(f"{path}: not UTF-8 text ({error}); fetch the file again") from None


def read_json(path: Path, expected: type = dict) -> Any:
  """The JSON of a file. Raises: BenchmarkError when it is broken or of another type."""
  try:
    value = json.loads(read_text(path))
  except json.JSONDecodeError as error:
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
  lines, problems = _json_lines(path)
  rows = []
  for number, row in lines:
    if not isinstance(row, dict) or (absent := [key for key in keys if key not in row]):
      found = f"without {', '.join(absent)}" if isinstance(row, dict) else "no object"
      problems.append((number, found))
    else:
      rows.append(row)
  told = [f"line {number}: {found}" for number, found in sorted(problems)]
  _refuse_empty(path, told, rows, f"JSON lines with {', '.join(keys)}")
  return rows


def read_rows(path: Path) -> list[tuple[int, Any]]:
  """(number from 1, value) of a JSON list, or of the lines of JSON lines; blank lines are skipped.

  Raises: BenchmarkError for what is neither.
  """
  if read_text(path).lstrip().startswith("["):
    return list(enumerate(read_json(path, list), 1))
  rows, problems = _json_lines(path)
  told = [f"line {number}: {found}" for number, found in problems]
  _refuse_empty(path, told, rows, "a JSON list, or JSON lines")
  return rows


def _json_lines(path: Path) -> tuple[list[tuple[int, Any]], list[tuple[int, str]]]:
  """(line, value) of the lines that are JSON, and (line, problem) of the others."""
  rows, problems = [], []
  for number, line in enumerate(read_text(path).split("\n"), 1):
    if line.strip():
      try:
        rows.append((number, json.loads(line)))
      except ValueError as error:
        problems.append((number, f"not JSON ({error})"))
  return rows, problems


def _refuse_empty(path: Path, problems: list[str], rows: Sequence[Any], expected: str) -> None:
  refuse(path, problems, expected)
  if not rows:
    raise BenchmarkError(f"{path}: empty; expected {expected}")


def check_rows(path: Path, rows: Iterable[tuple[str, Any]], keys: Sequence[str]) -> None:
  """(name, row) pairs must be objects with `keys`. Raises: BenchmarkError with all that are not."""
  problems = []
  for name, row in rows:
    absent = keys if not isinstance(row, dict) else [key for key in keys if key not in row]
    if absent:
      problems.append(f"{name}: without {', '.join(absent)}")
  refuse(path, problems, f"entries with {', '.join(keys)}")


def read_tsv(path: Path, keys: Sequence[str]) -> list[dict[str, str]]:
  """Rows of a tab-separated file with a header, fields of any length (MMBench keeps images in it).

  Raises: BenchmarkError for what is no such text, a header without `keys`, lines of another width.
  """
  csv.field_size_limit(sys.maxsize)
  with path.open(encoding="utf-8-sig", newline="") as file:
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
