"""Reads a file of samples: a JSON list or JSON lines, in UTF-8, UTF-16 or UTF-32."""

from __future__ import annotations

import array
import codecs
import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_sp_jax import files
from llava_sp_jax.config import ConfigError
from llava_sp_jax.console import shortened
from llava_sp_jax.data import forms
from llava_sp_jax.data.failure import REASON, SampleError

EXPECTED = "expected a JSON list of samples, or JSON lines, one sample each"
UTF_8, BLANKS = "utf-8", b" \t\r\n"
_SIGNS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{},]', re.DOTALL)  # strings, and signs of JSON


class _NoText(ValueError):  # noqa: N818 - an internal signal, shown to users in another error
  """Reports bytes that are not valid in the encoding that was detected."""


def read(path: str | Path, key: str = "data.path") -> list[Any]:
  """Reads the samples of a file.

  Puts a SampleError in the place of a line or item that is not JSON.

  `key` is the setting that names the file, for messages.

  Raises:
    FileNotFoundError: when there is no such file.
    ConfigError: when the file holds no samples.
  """
  if not files.is_regular(Path(path)):
    raise FileNotFoundError(f"{key}: no file {str(path)[-REASON:]!r}; {EXPECTED}")
  try:
    return _read(str(path), Path(path).stat().st_mtime_ns)
  except (OSError, ValueError, RecursionError) as error:
    why = error.strerror if isinstance(error, OSError) else str(error)
    raise ConfigError(f"{key}: {path} {shortened(why or '', REASON)}; {EXPECTED}") from None


@functools.lru_cache(maxsize=2)
def _read(path: str, changed: int) -> list[Any]:
  """Reads a file; cached, since training and validation may read the same large one."""
  return _parsed(Path(path).read_bytes(), Path(path).name)


def _parsed(data: bytes, name: str) -> list[Any]:
  """Returns the samples in `data`; `name` is the file's name, for errors of samples.

  Raises: ValueError that says what the file holds in place of samples.
  """
  try:
    found = _loads(_decoded(data, json.detect_encoding(data)))
  except (ValueError, RecursionError) as error:
    why = _why(error)
  else:
    if isinstance(found, dict) and any(key in found for key in forms.DIALOGUES):
      return [found]
    if isinstance(found, list) and found:
      return found
    keys = f" with keys {', '.join(map(repr, found)) or 'none'}" if isinstance(found, dict) else ""
    raise ValueError(f"is not a list with at least one sample, but a {type(found).__name__}{keys}")
  return _apart(data, name, why)


def _why(error: Exception) -> str:
  """Returns why a file is not a single JSON value."""
  if isinstance(error, _NoText):
    return str(error)
  if isinstance(error, RecursionError):
    return "is not a list of samples (nested too deeply)"
  empty = isinstance(error, json.JSONDecodeError) and not error.doc.strip()
  return f"is not JSON ({'it is empty' if empty else error})"


def _apart(data: bytes, name: str, why: str) -> list[Any]:
  """Reads each item of a list, or each line, of a file that is not a single JSON value.

  Raises: ValueError with the text `why` when items or lines cannot be found or none is a sample.
  """
  if data.startswith(codecs.BOM_UTF8):
    data = b" " * len(codecs.BOM_UTF8) + data[len(codecs.BOM_UTF8) :]
  elif (encoding := json.detect_encoding(data)) != UTF_8:
    try:
      data, name = _decoded(data, encoding).encode(UTF_8, "surrogatepass"), f"{name} as UTF-8"
    except _NoText:
      raise ValueError(why) from None
  first = data.lstrip(BLANKS).partition(b"\n")[0]
  parts = _items(data) if first.startswith(b"[") else _lines(data)
  if parts is None and _items(first) is not None:  # the first line is a list by itself
    parts = _lines(data)
  found = [_sample(name, *part) for part in parts or ()]
  if not any(isinstance(sample, dict) for sample in found):
    raise ValueError(why)
  return found


Part = tuple[str, int, bytes]  # name for messages, offset in the file, content


def _lines(data: bytes) -> Iterator[Part]:
  at = 0
  for number, line in enumerate(data.split(b"\n"), 1):
    if line.strip():
      yield f"line {number}", at, line
    at += len(line) + 1


def _items(data: bytes) -> Iterator[Part] | None:
  """Finds the items of a list by brackets and commas alone; returns None if the list is incomplete.

  So one item that is not JSON, not text, or nested too deeply does not affect the others. Uses no
  recursion, and stores only the offsets of the items.
  """
  depth, borders = 0, array.array("q")
  for found in _SIGNS.finditer(data):
    sign = found[0]
    if sign[:1] == b'"':
      continue
    depth += (sign in b"[{") - (sign in b"]}")
    if depth == 0 or (depth == 1 and (sign == b"," or not borders)):
      borders.append(found.start())
    if depth == 0:
      break
  if depth or len(borders) < 2 or data[borders[-1] + 1 :].strip(BLANKS):
    return None
  spans = itertools.pairwise(borders)
  return ((f"item {n}", a + 1, data[a + 1 : b]) for n, (a, b) in enumerate(spans, 1))


def _sample(name: str, part: str, start: int, content: bytes) -> Any:
  """Parses a part; returns its value, or a SampleError that says why it has none."""
  try:
    return _loads(_decoded(content, UTF_8, start))
  except _NoText as error:
    why = str(error)
  except RecursionError:
    why = f"at byte {start} is not JSON (nested too deeply)"
  except json.JSONDecodeError as error:
    at = start + len(error.doc[: error.pos].encode(UTF_8, "surrogatepass"))
    why = f"is not JSON ({error.msg.removesuffix(' at')} at byte {at})"
  return SampleError(f"{name}, {part} {why}")


def _decoded(data: bytes, encoding: str, start: int = 0) -> str:
  """Decodes bytes that begin at offset `start` of a file. Raises: _NoText."""
  try:
    # Half of a surrogate pair must fail only its sample (in `forms`), not the file.
    return data.decode(encoding, "surrogatepass")
  except UnicodeDecodeError as error:
    at = len(data) - len(error.object) + error.start  # `error.object` lacks the byte order mark
    name = encoding.removesuffix("-sig")
    raise _NoText(
      f"is not {name} text (byte {data[at]:#04x} at {start + at}); save it as UTF-8"
    ) from None


def _loads(text: str) -> Any:
  """Parses JSON; keeps an integer with more digits than Python converts as text.

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
