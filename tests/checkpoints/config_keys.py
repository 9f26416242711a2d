"""Keys of a config, and another value for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any


def keys(values: Any, at: str = "config") -> Iterator[tuple[str, Any]]:
  for field in dataclasses.fields(values):
    value = getattr(values, field.name)
    if dataclasses.is_dataclass(value):
      yield from keys(value, f"{at}.{field.name}")
    else:
      yield f"{at}.{field.name}", value


def another(value: Any) -> Any:
  if isinstance(value, bool):
    return not value
  if isinstance(value, tuple):
    return (*value, *(value[-1:] or ("x",)))
  return f"{value}x" if isinstance(value, str) else value + 1


def changed(values: Any, key: str, value: Any) -> Any:
  name, _, rest = key.partition(".")
  return dataclasses.replace(
    values, **{name: changed(getattr(values, name), rest, value) if rest else value}
  )
