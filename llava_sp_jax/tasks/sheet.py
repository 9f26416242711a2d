"""Writes Excel files, which MMBench's server takes, with the optional package openpyxl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def need(path: Path | str) -> None:
  """Checks for openpyxl; `path` is the file to be written, for the message.

  Raises: ModuleNotFoundError that says what to install.
  """
  try:
    import openpyxl  # noqa: F401
  except ModuleNotFoundError:
    raise ModuleNotFoundError(
      f"{path}: writing Excel files needs openpyxl: pip install llava-sp-jax[xlsx]"
    ) from None


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
  """Writes an Excel file of one sheet and returns its path.

  Text stays text, even if it begins with `=`; control characters are left out.

  Raises: ModuleNotFoundError that says what to install.
  """
  need(path)
  import openpyxl
  from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

  book = openpyxl.Workbook()
  page = book.active
  for number, values in enumerate((header, *rows), 1):
    for column, value in enumerate(values, 1):
      if isinstance(value, str):
        cell = page.cell(number, column, ILLEGAL_CHARACTERS_RE.sub("", value))
        cell.data_type = "s"
      elif value is not None:
        page.cell(number, column, value)
  path.parent.mkdir(parents=True, exist_ok=True)
  book.save(path)
  return path
