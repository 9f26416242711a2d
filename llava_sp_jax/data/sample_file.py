"""A file of samples: a JSON list, or JSON lines, in UTF-8, UTF-16 or UTF-32."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import forms
from llava_sp_jax.data.failure import SampleError, shortened

EXPECTED = "expected a JSON list of samples, or JSON lines, one sample each"


class _NoText(ValueError):  # noqa: N818 - named where it is told
  """Bytes that are no text in the encoding that they seem to be in."""


def read(path: str | Path, key: str = "data.path") -> list[Any]:
  """The samples; a line that is no JSON is a SampleError in the sample's place.

  `key` is the setting that names the file. Raises: FileNotFoundError; ConfigError, in one line that
  names the file, when it holds no samples.
  """
  if not Path(path).is_file():
    raise FileNotFoundError(f"{key}: no file {str(path)!r}; {EXPECTED}")
  try:
    return _read(str(path), Path(path).stat().st_mtime_ns)
  except (OSError, ValueError, RecursionError) as error:
    why = error.strerror if isinstance(error, OSError) else str(error)
    raise ConfigError(f"{key}: {path} {shortened(why or '')}; {EXPECTED}") from None


@functools.lru_cache(maxsize=2)
def _read(path: str, changed: int) -> list[Any]:
  """Kept, since training and validation may read the same large file."""
  return _parsed(Path(path).read_bytes())


def _parsed(data: bytes) -> list[Any]:
  """Raises: ValueError that says what the file is."""
  try:
    text = _decoded(data)
  except ValueError:
    lines = _lines_of_bytes(data)
    if not any(isinstance(line, dict) for line in lines):
      raise
    return lines
  try:
    found = _loads(text)
  except RecursionError:
    raise ValueError("is not a list of samples (nested too deeply)") from None
  except ValueError as error:
    lines = [] if text.lstrip()[:1] == "[" else _lines(text)
    if not any(isinstance(line, dict) for line in lines):
      why = error if text.strip() else "it is empty"
      raise ValueError(f"is not JSON ({why})") from None
    return lines
  if isinstance(found, dict) and any(key in found for key in forms.DIALOGUES):
    return [found]
  if isinstance(found, list) and found:
    return found
  keys = f" with keys {', '.join(map(repr, found)) or 'none'}" if isinstance(found, dict) else ""
  raise ValueError(f"is not a list with at least one sample, but a {type(found).__name__}{keys}")


def _decoded(data: bytes) -> str:
  encoding = json.detect_encoding(data)
  try:
    # Half a surrogate pair is the failure of the sample that has it, not of the file.
    return data.decode(encoding, "surrogatepass")
  except UnicodeDecodeError as error:
    raise _NoText(
      f"is not {encoding} text (byte {data[error.start]:#04x} at {error.start}); save it as UTF-8"
    ) from None


def _lines(text: str) -> list[Any]:
  lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
  return [_line(number, line) for number, line in lines]


def _lines_of_bytes(data: bytes) -> list[Any]:
  """As `_lines`, for lines of which some are no text; none for what begins as a list does."""
  if data.lstrip()[:1] == b"[":
    return []
  return [_line(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]


def _line(number: int, line: str | bytes) -> Any:
  try:
    return _loads(line if isinstance(line, str) else _decoded(line))
  except _NoText as error:
    return SampleError(f"line {number} {error}")
  except (ValueError, RecursionError) as error:
    return SampleError(f"line {number} is not JSON ({error})")


def _loads(text: str) -> Any:
  """What JSON says; a number with more digits than Python reads is kept as a text.

  Raises: JSONDecodeError; RecursionError.
  """
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    raise
  except ValueError:
    return json.loads(text, parse_int=_whole)


def _whole(digits: str) -> int | str:
  try:
    return int(digits)
  except ValueError:
    return digits
