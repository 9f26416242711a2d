"""The steps of a run folder as they lie on disk: which are whole, and what they say of themselves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_sp_jax.checkpoints.runs import read_config
from llava_sp_jax.errors import CheckpointError

PLACE = "checkpoints"
SUMS = "sums"  # the item of a checkpoint with the checksum of every array


def trouble(place: Path, items: Sequence[str] = ("params", "about")) -> str:
  """Why the folder of a step is no whole checkpoint, as far as names tell; empty when it is one."""
  if not place.is_dir():
    return "it is no folder"
  if missing := [item for item in items if not (place / item).is_dir()]:
    return f"it has no {', '.join(missing)}"
  if SUMS in _listed(place) and not (place / SUMS).is_dir():
    return f"its {SUMS}, by which its values are verified, are gone"
  try:
    number = about(place).get("step", place.name)
  except CheckpointError as error:
    return str(error)
  if str(number) != place.name:
    return f"it says that it is step {number}"
  bare = [item for item in items if item != "about" and not (place / item / "_METADATA").is_file()]
  return f"{bare[0]} has no _METADATA" if bare else ""


def _listed(place: Path) -> set[str]:
  """What Orbax has noted that it saved in the folder of a step; nothing where there is no note."""
  try:
    return set(json.loads((place / "_CHECKPOINT_METADATA").read_bytes())["item_handlers"])
  except (OSError, ValueError, RecursionError, LookupError, TypeError):
    return set()


def about(place: Path) -> dict[str, Any]:
  """What a checkpoint says of itself. Raises: CheckpointError."""
  return _json(place / "about")


def checksums(place: Path) -> dict[str, dict[str, int]]:
  """The checksums kept in a checkpoint, by item; {} for one of the time before there were any.

  Raises: CheckpointError.
  """
  return _json(place / SUMS) if (place / SUMS).is_dir() else {}


def _json(item: Path) -> dict[str, Any]:
  try:
    values = json.loads((item / "metadata").read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise CheckpointError(f"{item} cannot be read ({error})") from None
  if not isinstance(values, dict):
    raise CheckpointError(f"{item} cannot be read (found {values!r:.40})")
  return values


def _numbered(folder: Path) -> dict[int, Path]:
  place = folder.absolute() / PLACE
  found = place.iterdir() if place.is_dir() else ()
  numbered = (p for p in found if p.name.isascii() and p.name.isdigit())
  return {int(p.name): p for p in numbered if p.name == str(int(p.name))}


def steps(folder: Path) -> list[int]:
  """Steps of the whole checkpoints in a run folder."""
  return sorted(step for step, place in _numbered(folder).items() if not trouble(place))


def damaged(folder: Path) -> dict[int, str]:
  """{step: why} of what has the name of a checkpoint and is no whole one."""
  found = {step: trouble(place) for step, place in sorted(_numbered(folder).items())}
  return {step: why for step, why in found.items() if why}


Accept = Callable[[Path, dict[str, Any]], None]


def saved(folder: str | Path, accept: Accept | None = None) -> tuple[Path, dict[str, Any], int]:
  """Where the latest parameters are saved; what the run says of itself; its step.

  `accept(place, about)` raises an error for a checkpoint that it cannot use. The next older one is
  taken then, and a line on stderr says so.

  Raises: CheckpointError when there is no whole checkpoint, with what is wrong with each.
  """
  config = read_config(folder)
  problems = damaged(Path(folder))
  for step in reversed(steps(Path(folder))):
    place = Path(folder).absolute() / PLACE / str(step)
    try:
      said = about(place)
      if accept:
        accept(place, said)
    except CheckpointError as error:
      problems[step] = str(error)
      continue
    if newer := {number: why for number, why in problems.items() if number > step}:
      print(f"llava-sp: WARNING: {folder}: {listed(newer)}; step {step} is used instead",
            file=sys.stderr, flush=True)  # fmt: skip
    return place / "params", said, step
  if problems:
    raise CheckpointError(f"{folder}: no checkpoint can be used: {listed(problems)}")
  raise CheckpointError(f"{folder}: no checkpoint yet (run {config.name!r}); train it first")


def listed(problems: Mapping[int, str]) -> str:
  return "; ".join(f"step {step} cannot be used: {why}" for step, why in sorted(problems.items()))
