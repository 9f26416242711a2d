"""Reads foreign JSON files (settings, indexes, headers) strictly and within bounds.

Beyond the JSON grammar, it refuses values that later code could not handle: NaN and infinities
(written out, or as 1e999), duplicate keys, deep nesting, and half a surrogate pair.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from llava_sp_jax import files
from llava_sp_jax.files import FormatError

MAX_BYTES = 16 << 20
MAX_VALUES = 1 << 19  # brackets and commas, which bound the values in memory
MAX_DEPTH = 32
MAX_DIGITS = 300  # of an integer, so that it fits into float64

Json = dict[str, Any]
NUMBER = object()  # the kind of a finite number in `fits`
LARGEST_NUMBER = 1e300  # a larger number is a damaged file
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def read(path: Path) -> Any:
  """Returns the value in a regular UTF-8 file.

  Raises: FormatError for anything but strict JSON within the bounds of this module.
  """
  return parse(files.read(path, MAX_BYTES), str(path))


def read_object(path: Path) -> Json:
  """Returns the object in a regular UTF-8 file.

  Raises: FormatError for any other value, or anything but strict JSON within the bounds.
  """
  return parse_object(files.read(path, MAX_BYTES), str(path))


def parse_object(data: bytes, origin: str) -> Json:
  """Returns the object in the UTF-8 text `data`; errors name `origin`.

  Raises: FormatError for any other value, or anything but strict JSON within the bounds.
  """
  values = parse(data, origin)
  if not isinstance(values, dict):
    raise FormatError(f"{origin}: expected a JSON object, found {_kind(values)}")
  return values


def parse(data: bytes, origin: str) -> Any:
  """Returns the value of the UTF-8 text `data`; errors name `origin`.

  Raises: FormatError, in one line, for anything but strict JSON within the bounds of this module.
  """
  held = sum(data.count(sign) for sign in (b"[", b"{", b","))
  if held > MAX_VALUES or len(data) > MAX_BYTES:
    raise FormatError(
      f"{origin}: JSON of {len(data):,} bytes and about {held:,} values, expected at most "
      f"{MAX_BYTES:,} and {MAX_VALUES:,}"
    )
  try:
    value = json.loads(
      data.decode("utf-8-sig"),
      object_pairs_hook=_once,
      parse_constant=_no_constant,
      parse_float=_finite,
      parse_int=_integer,
    )
    _walk(value, texts=bool(_HALF_PAIR.search(data)))
  except RecursionError:
    raise FormatError(f"{origin}: JSON nested deeper than {MAX_DEPTH} levels") from None
  except UnicodeDecodeError as error:
    raise FormatError(f"{origin}: not JSON (not UTF-8 at byte {error.start})") from None
  except ValueError as error:  # also JSONDecodeError
    raise FormatError(f"{origin}: not JSON ({error})") from None
  return value


def _once(pairs: list[tuple[str, Any]]) -> Json:
  result = dict(pairs)
  if len(result) < len(pairs):
    seen: set[str] = set()
    twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
    raise ValueError(f"the key {_shown(twice)} is given twice")
  return result


def _no_constant(text: str) -> None:
  raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise ValueError(f"the number {text:.40} is too large")
  return value


def _integer(text: str) -> int:
  if len(text) > MAX_DIGITS:
    raise ValueError(f"an integer of {len(text):,} digits")
  return int(text)


def _walk(value: Any, *, texts: bool) -> None:
  """Checks the depth of a value and, with `texts`, that its texts can be encoded.

  Raises: RecursionError for deep nesting, ValueError for a text that no encoding can write.
  """
  level = [value]
  for _ in range(MAX_DEPTH + 1):
    if texts:
      for item in level:
        _encodable(item)
    level = [
      child
      for item in level
      if isinstance(item, list | dict)
      for child in (item.values() if isinstance(item, dict) else item)
    ]
    if not level:
      return
  raise RecursionError


def _encodable(item: Any) -> None:
  for text in item if isinstance(item, dict) else (item,):
    if isinstance(text, str):
      try:
        text.encode()
      except UnicodeEncodeError:
        raise ValueError(f"half a surrogate pair in {_shown(text)}") from None


def _shown(text: str) -> str:
  return ascii(text[:60])


def _kind(value: Any) -> str:
  names = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
  return names.get(type(value), "a number")


def fits(value: Any, kind: Any) -> Any:
  """Returns whether a value is of a kind.

  A kind is a type, NUMBER, a tuple of possible kinds, a list of one kind (of its items), or a
  dictionary of keys that must exist with their kinds.
  """
  if kind is NUMBER:
    return isinstance(value, int | float) and -LARGEST_NUMBER < value < LARGEST_NUMBER
  if isinstance(kind, tuple):
    return any(fits(value, one) for one in kind)
  if isinstance(kind, list):
    return isinstance(value, list) and all(fits(one, kind[0]) for one in value)
  if isinstance(kind, dict):
    return isinstance(value, dict) and all(
      key in value and fits(value[key], one) for key, one in kind.items()
    )
  return isinstance(value, kind)
