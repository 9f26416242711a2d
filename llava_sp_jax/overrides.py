"""Builds frozen dataclasses from nested mappings and from command-line texts, and compares them.

An unknown key is an error that lists the known ones, so that a typo never trains the wrong thing.
"""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from llava_sp_jax.errors import LlavaSPError

Row = TypeVar("Row")
C = TypeVar("C")


class ConfigError(LlavaSPError, ValueError):
  """Reports a configuration that cannot be used; the message names the key and what to do."""


# Metadata of a field, or a group of fields, that may change when a run is resumed, because it
# changes neither numbers nor files.
FREE = {"resume": "free"}


def free(default: Any) -> Any:
  """Makes a field whose value may change when a run is resumed."""
  return dataclasses.field(default=default, metadata=FREE)


def formerly(name: str, default: Any) -> Any:
  """Makes a field that had the name `name` before; that name is still read, but never written."""
  return dataclasses.field(default=default, metadata={"formerly": name})


def former_names(cls: type[Any]) -> dict[str, str]:
  """Returns {former name: present name} of a class's fields; {} if none was renamed."""
  fields = [field for field in dataclasses.fields(cls) if "formerly" in field.metadata]
  return {field.metadata["formerly"]: field.name for field in fields}


def renamed(values: Any, cls: type[Any], path: str = "config") -> dict[str, Any]:
  """Returns `values`, nested mappings of `cls`, with present names in place of former ones.

  `path` is the prefix of keys in messages.

  Raises: ConfigError where a mapping has both names of a field.
  """
  names, hints, result = former_names(cls), typing.get_type_hints(cls), {}
  for key, value in values.items():
    name = names.get(key, key)
    if name != key and name in values:
      raise ConfigError(
        f"{path}.{key}: the former name of {name}, which is there too; leave it out"
      )
    group = hints.get(name)
    nested = dataclasses.is_dataclass(group) and hasattr(value, "items")
    result[name] = (
      renamed(value, typing.cast(type[Any], group), f"{path}.{name}") if nested else value
    )
  return result


def from_dict(values: Any, cls: type[C], path: str = "config") -> C:
  """Builds the dataclass `cls` from nested mappings; keys may have a former name.

  `path` is the prefix of keys in messages.

  Raises: ConfigError for unknown keys and wrong types, all at once, with the known keys.
  """
  problems: list[str] = []
  if not hasattr(values, "items"):
    raise ConfigError(f"{path}: expected a group of keys, found {values!r:.60}")
  result: C = _build(renamed(values, cls, path), cls, path, problems)
  if problems:
    raise ConfigError("invalid config:\n  " + "\n  ".join(problems))
  return result


SHOWN = 6  # of keys that are not known


def _build(values: Any, cls: type[Any], path: str, problems: list[str]) -> Any:
  hints = typing.get_type_hints(cls)
  known = [f.name for f in dataclasses.fields(cls)]
  if unknown := [str(key) for key in values if key not in known]:
    first, *others = unknown
    what = (
      f".{first}: unknown key" if not others else f": unknown keys {', '.join(unknown[:SHOWN])}"
    )
    more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
    problems.append(f"{path}{what}{more}; known here: {', '.join(known)}")
  kwargs = {
    key: _convert(value, hints[key], f"{path}.{key}", problems)
    for key, value in dict(values).items()
    if key in known
  }
  return cls(**kwargs)


def _convert(value: Any, hint: Any, path: str, problems: list[str]) -> Any:
  if dataclasses.is_dataclass(hint):
    if not hasattr(value, "items"):
      problems.append(f"{path}: expected a group of keys, found {value!r}")
      return None
    return _build(value, typing.cast(type[Any], hint), path, problems)
  if isinstance(hint, types.GenericAlias):  # tuple[float, ...]
    if not isinstance(value, list | tuple):
      problems.append(f"{path}: expected a list, found {value!r}")
      return None
    element = typing.get_args(hint)[0]
    return tuple(_convert(v, element, f"{path}[{i}]", problems) for i, v in enumerate(value))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    problems.append(f"{path}: expected {hint.__name__}, found {value!r}")
  return value


def to_dict(config: Any) -> dict[str, Any]:
  """Returns a config as plain nested dictionaries, the inverse of `from_dict`."""
  return dataclasses.asdict(config)


def differences(ours: Any, theirs: Any, path: str = "config", but_free: bool = False) -> list[str]:
  """Returns a line for each value in which two configs differ; [] if none does.

  `path` is the prefix of the keys. `but_free` leaves out fields that may change when a run is
  resumed.
  """
  lines = []
  for field in dataclasses.fields(ours):
    if but_free and field.metadata.get("resume") == "free":
      continue
    a, b = getattr(ours, field.name), getattr(theirs, field.name)
    where = f"{path}.{field.name}"
    if dataclasses.is_dataclass(a):
      lines += differences(a, b, where, but_free)
    elif a != b:
      lines.append(f"{where}: {a!r} here, {b!r} there")
  return lines


def lookup(key: str, name: str, table: Mapping[str, Row]) -> Row:
  """Returns the row `name` of a table.

  `key` is the setting that holds the name, for the message.

  Raises: ConfigError that names `key` and lists the known rows.
  """
  if name not in table:
    raise ConfigError(f"{key}: unknown {name!r}; known: {', '.join(sorted(table))}")
  return table[name]


def override(config: C, texts: Mapping[str, str]) -> C:
  """Returns `config` with some values replaced by texts: {"config.train.steps": "200"}.

  Raises: ConfigError for unknown keys and texts of the wrong type, all of them at once.
  """
  values, problems = to_dict(config), []
  for key, text in texts.items():
    place, where, holder = values, "config", typing.cast(Any, config)
    *groups, name = key.split(".")[1:]
    for group in groups:
      if not isinstance(place.get(group), dict):
        name = group
        break
      place, where, holder = place[group], f"{where}.{group}", getattr(holder, group)
    former, name = name, former_names(type(holder)).get(name, name)
    if name not in place:
      problems.append(f"{where}.{name}: unknown key; known here: {', '.join(place)}")
    elif not key.endswith(f"{where}.{former}"):
      problems.append(f"{key}: {where}.{name} is a value, and has no keys")
    elif isinstance(place[name], dict):
      problems.append(f"{where}.{name}: a group; name one of its keys: {', '.join(place[name])}")
    else:
      try:
        place[name] = parse(text, place[name])
      except (ValueError, KeyError):
        is_list = isinstance(place[name], tuple)
        kind = "a list such as ('a', 'b')" if is_list else type(place[name]).__name__
        problems.append(f"{where}.{name}: expected {kind}, found {text!r:.60}")
  if problems:
    raise ConfigError("; ".join(problems))
  return from_dict(values, type(config))


def parse(text: str, like: Any) -> Any:
  """Parses a text as a value of the type of `like`: a bool, number, text or tuple.

  Raises: ValueError, KeyError for a text that is no such value.
  """
  if isinstance(like, bool):
    return {"true": True, "false": False}[text.lower()]
  if isinstance(like, tuple):
    try:
      values = ast.literal_eval(text.strip() or "()")
    except SyntaxError:
      raise ValueError(text) from None
    return tuple(values) if isinstance(values, list | tuple) else (values,)
  return type(like)(text)
