"""Reads the keys of foreign settings files: each is honored, without effect, or refused.

A table names every key that its file may hold. `read` checks types and ranges, and refuses values
that are not supported and keys that no table has, all of a file in one message. It returns the
honored keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from llava_sp_jax.convert.torch_io import FormatError

Json = dict[str, Any]
ALLOW = "--allow-unknown"  # the option that ignores unknown keys
SHOWN = 60  # characters of a value in a message


@dataclasses.dataclass(frozen=True)
class Kind:
  """Holds a kind of value, such as an integer in a range, and its name in messages.

  `holds(value)` says whether a value is of that kind.
  """

  what: str
  holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def whole(low: int, high: int) -> Kind:
  """Returns the kind of a whole number from `low` to `high`, both included."""
  return Kind(
    f"a whole number from {low} to {high}",
    lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
  )


def real(low: float, high: float) -> Kind:
  """Returns the kind of a finite number from `low` to `high`, both included."""
  return Kind(
    f"a number from {low:g} to {high:g}",
    lambda v: _is_number(v) and low <= v <= high and math.isfinite(v),
  )


def choice(*names: str) -> Kind:
  """Returns the kind of a text that is one of `names`."""
  return Kind(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names)


def maybe(kind: Kind) -> Kind:
  """Returns the kind that accepts null and what `kind` accepts."""
  return Kind(f"{kind.what}, or null", lambda v: v is None or kind.holds(v))


def either(*kinds: Kind) -> Kind:
  """Returns the kind that accepts what any of these kinds accepts."""
  return Kind(" or ".join(k.what for k in kinds), lambda v: any(k.holds(v) for k in kinds))


def listing(kind: Kind, least: int = 1, most: int = 4096) -> Kind:
  """Returns the kind of a list with `least` to `most` items of one kind."""
  count = f"{least}" if least == most else f"{least} to {most}"
  return Kind(
    f"a list of {count} items, each {kind.what}",
    lambda v: isinstance(v, list) and least <= len(v) <= most and all(map(kind.holds, v)),
  )


ANYTHING = Kind("anything", lambda v: True)
TEXT = Kind("a text", lambda v: isinstance(v, str) and len(v) <= 1 << 20)
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
GROUP = Kind("a group of keys", lambda v: isinstance(v, dict))
SIZE = whole(1, 1 << 24)
LAYERS = whole(1, 4096)
POSITIVE = real(1e-30, 1e30)

NOTHING: tuple[Any, ...] = (False, 0, "", [], {})  # values that say that something is absent
HONORED, IDLE, REFUSED = "honored", "without effect", "refused"


@dataclasses.dataclass(frozen=True)
class Key:
  """Describes a key: what happens to it, and why.

  If `values` is given, all other values are refused.
  """

  place: str  # HONORED, IDLE or REFUSED
  why: str
  kind: Kind = ANYTHING
  values: tuple[Any, ...] | None = None
  null: bool = True  # whether null is the same as a missing key


Table = Mapping[str, Key]


def honored(kind: Kind, how: str) -> Key:
  """Describes a key whose value is used; `how` says for what, in the docs."""
  return Key(HONORED, how, kind)


def idle(why: str, kind: Kind = ANYTHING) -> Key:
  """Describes a key that has no effect on any result."""
  return Key(IDLE, why, kind)


def only(why: str, *values: Any) -> Key:
  """Describes a key without effect at these values and at null, which is refused at all others."""
  return Key(REFUSED, why, values=values)


def always(why: str, *values: Any) -> Key:
  """Describes a key that has no effect at these values, and is refused at all others and at null.

  A program that is not told the value takes one of `values`.
  """
  return Key(REFUSED, why, values=values, null=False)


def never(why: str) -> Key:
  """Describes a key that is refused unless it is null, false, 0 or empty; `why` is for messages."""
  return Key(REFUSED, why, values=NOTHING)


def rows(key: Key, *names: str) -> dict[str, Key]:
  """Returns a table in which each of `names` has the meaning `key`."""
  return dict.fromkeys(names, key)


def problem(name: str, value: Any, key: Key) -> str:
  """Returns what is wrong with a value of the key `name`, described by `key`; "" if nothing is."""
  if key.values is not None:
    said = value is not None or not key.null
    if not said or any(type(value) is type(v) and value == v for v in key.values):
      return ""
    known = ", ".join(repr(v) for v in key.values)
    return f"not supported: {name}={_short(value)} (known: {known}; {key.why})"
  if not key.kind.holds(value):
    return f"{name}: expected {key.kind.what}, found {_short(value)}"
  return ""


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= SHOWN else text[:SHOWN] + ".."


def read(values: Any, table: Table, origin: str, allow_unknown: bool = False) -> Json:
  """Returns the keys of a settings file that have an effect, with their values.

  Args:
    values: the content of the file.
    table: describes every key that it may have.
    origin: the file, for messages.
    allow_unknown: whether keys that the table lacks are ignored, as null ones always are.

  Raises: FormatError, in one line, that names every key with a wrong or unsupported value, and
    every unknown key.
  """
  if not isinstance(values, dict):
    raise FormatError(f"{origin}: expected a group of keys, found {_short(values)}")
  found = [problem(name, values[name], key) for name, key in table.items() if name in values]
  problems = [text for text in found if text]
  # null is the same as a missing key, whatever the key means.
  unknown = [_short(n)[1:-1] for n, value in values.items() if n not in table and value is not None]
  if unknown and not allow_unknown:
    listed = ", ".join(unknown[:12]) + (f" and {len(unknown) - 12} more" if unknown[12:] else "")
    problems.append(
      f"unknown key {listed}: what it changes is not known here; llava-sp convert {ALLOW} passes "
      "it over, and the folder that it writes goes wherever this one does"
    )
  if problems:
    raise FormatError(f"{origin}: {'; '.join(problems)}")
  return {n: v for n, v in values.items() if n in table and table[n].place == HONORED}
