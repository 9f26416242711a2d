"""Wraps a user's own benchmark, FILE.py:Class, so that its errors are one line with their place."""

from __future__ import annotations

import functools
import inspect
import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sp_jax import console
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.json_files import NUMBER, fits
from llava_sp_jax.tasks.task import EvalError, Item, Scores

# Checks what a method returned, given the arguments of its call, and returns it to the caller.
Check = Callable[..., Any]
ITEM = {"id": str, "question": str, "kind": str, "extra": dict, "problem": str}


def guarded(found: type, file: str) -> type:
  """Returns a subclass of a user's task class that checks what each method returns.

  Its methods raise an EvalError that names the file and line if they return a wrong value or raise
  an error that is not meant for users. `file` is the user's file, for messages.

  Raises: EvalError for a class whose members are not those of a task.
  """
  label = f"{file}:{found.__name__}"
  if inspect.isabstract(found):
    raise EvalError(
      f"{label}: abstract; without {', '.join(sorted(vars(found)['__abstractmethods__']))}"
    )
  name, generation = getattr(found, "name", None), getattr(found, "generation", None)
  if not isinstance(name, str) or not name.strip() or set(name) & set("/\0,=") or name[0] == ".":
    raise EvalError(f"{label}: name {name!r:.40}, expected a text that can name a folder")
  if not isinstance(generation, Generation | property | functools.cached_property):
    raise EvalError(f"{label}: generation {generation!r:.40}, expected an infer.Generation")
  takes = getattr(found, "options", ())
  if not isinstance(takes, tuple | list) or not all(isinstance(key, str) for key in takes):
    raise EvalError(f"{label}: options {takes!r:.40}, expected a tuple of names")
  members = {key: _method(getattr(found, key), label, key, check) for key, check in CHECKS.items()}
  return type(found.__name__, (found,), {**members, "__module__": found.__module__})


def _method(inherited: Callable[..., Any], label: str, name: str, check: Check) -> Any:
  @functools.wraps(inherited)
  def called(self: Any, *arguments: Any, **options: Any) -> Any:
    try:
      return check(inherited(self, *arguments, **options), self, *arguments)
    except Exception as error:
      if console.error_line(error):  # an error that is meant for users
        raise
      raise EvalError(f"{label}: {name} ends with {_described(error)}") from error

  return called


def _described(error: Exception) -> str:
  """Returns the text of an error, with the line of the user's file that raised it or led to it."""
  frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
  place = f" ({Path(frames[0].filename).name}, line {frames[0].lineno})" if frames else ""
  return f"{type(error).__name__}: {error}{place}"


def _made(nothing: Any, task: Any, *_: Any) -> None:
  if not isinstance(task.protocol, str):
    raise TypeError(f"protocol {task.protocol!r:.40}, expected a text")


def _items(value: Any, *_: Any) -> list[Item]:
  items = list(value)
  for place, item in enumerate(items):
    if not isinstance(item, Item):
      raise TypeError(f"[{place}] is {item!r:.60}, expected a tasks.task.Item")
    if wrong := [key for key, kind in ITEM.items() if not isinstance(getattr(item, key), kind)]:
      raise TypeError(
        f"[{place}]: {wrong[0]} {getattr(item, wrong[0])!r:.60}, expected {ITEM[wrong[0]].__name__}"
      )
    images = item.images if isinstance(item.images, tuple) else (None,)
    if not all(isinstance(image, Path | bytes | str) for image in images):
      raise TypeError(f"[{place}]: images {item.images!r:.60}, expected a tuple of paths or bytes")
    _writable(item.truth, f"[{place}]: the truth")
  return items


def _verdict(value: Any, *_: Any) -> dict[str, Any]:
  if not isinstance(value, dict):
    raise TypeError(f"it returned {value!r:.60}, expected a dict")
  if "score" in value and not fits(value["score"], NUMBER):
    raise ValueError(f"score {value['score']!r:.40}, expected a finite number")
  result: dict[str, Any] = _writable(value, "it")
  return result


def _scores(value: Any, *_: Any) -> Scores:
  if not isinstance(value, Scores):
    raise TypeError(f"it returned {value!r:.60}, expected a tasks.task.Scores")
  rows = value.by_kind if isinstance(value.by_kind, dict) else {}
  counted = {"items": NUMBER, "asked": NUMBER}
  for kind in dict.fromkeys(("all", *rows)):
    row: Any = rows.get(kind)
    if not fits(row, counted) or not all(fits(figure, NUMBER) for figure in row.values()):
      raise ValueError(
        f"by_kind[{kind!r}] is {row!r:.60}, expected finite numbers with items, asked"
      )
  if value.headline is not None and not fits(value.headline, NUMBER):
    raise ValueError(f"headline {value.headline!r:.40}, expected a finite number or None")
  if not isinstance(value.metric, str):
    raise TypeError(f"metric {value.metric!r:.40}, expected a text")
  _writable([value.figures, value.verdicts], "figures or verdicts")
  return value


def _hash(value: Any, *_: Any) -> str:
  if not isinstance(value, str):
    raise TypeError(f"it returned {value!r:.60}, expected a text")
  return value


def _files(value: Any, *arguments: Any) -> list[Path]:
  paths = list(value or ())
  folder = arguments[-1]
  if wrong := [p for p in paths if not isinstance(p, Path) or not p.is_relative_to(folder)]:
    raise TypeError(f"it returned {wrong[0]!r:.60}, expected paths in {folder}")
  return paths


def _writable(value: Any, what: str) -> Any:
  try:
    json.dumps(value, allow_nan=False)
  except (TypeError, ValueError, RecursionError) as error:
    raise TypeError(f"{what} cannot be written as JSON: {error}") from None
  return value


CHECKS: dict[str, Check] = {
  "__init__": _made, "items": _items, "data_hash": _hash, "verdict": _verdict, "score": _scores,
  "submission": _files,
}  # fmt: skip
