"""Lists the steps of a run folder: which are complete, and what they record about themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_sp_jax import storage
from llava_sp_jax.errors import CheckpointError

PLACE = "checkpoints"
MARKER = "commit_success.txt"  # Orbax writes it last where folders cannot be renamed
SUMS = "sums"  # the item of a checkpoint with the checksum of every array


def trouble(place: Path, items: Sequence[str] = ("params", "about")) -> str:
  """Returns why the folder `place` of a step is not a complete checkpoint; "" for a complete one.

  `items` are the parts that it must have. Looks at file names and at `about`, not at values.
  """
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
  """Returns the items that Orbax has noted as saved for a step, or none if there is no note."""
  try:
    return set(json.loads((place / "_CHECKPOINT_METADATA").read_bytes())["item_handlers"])
  except (OSError, ValueError, RecursionError, LookupError, TypeError):
    return set()


def about(place: Path) -> dict[str, Any]:
  """Returns the metadata that was saved with a checkpoint, whose folder is `place`.

  Raises: CheckpointError when it is not there, or is no JSON object.
  """
  return _json(place / "about")


def checksums(place: Path) -> dict[str, dict[str, int]]:
  """Returns {item: {path: checksum}} of the checkpoint at `place`; {} for an old one without them.

  Raises: CheckpointError when the file of checksums is not there, or is no JSON object.
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


def _numbered(folder: Path, finished: bool = True) -> dict[int, Path]:
  """Returns the folders of steps whose save has ended, or of those whose save has not.

  On a disk, a folder has another name until then. In a bucket it lacks the marker.
  """
  place = storage.absolute(folder) / PLACE
  found = place.iterdir() if place.is_dir() else ()
  numbered = (p for p in found if p.name.isascii() and p.name.isdigit())
  named = {int(p.name): p for p in numbered if p.name == str(int(p.name))}
  marked = storage.remote(folder)
  return {n: p for n, p in named.items() if (not marked or (p / MARKER).exists()) == finished}


def unfinished(folder: Path) -> list[Path]:
  """Returns what saves have left in a bucket that did not end, or have not yet."""
  return list(_numbered(folder, finished=False).values())


def steps(folder: Path) -> list[int]:
  """Returns the steps of the complete checkpoints in a run folder, ascending; [] without any."""
  return sorted(step for step, place in _numbered(folder).items() if not trouble(place))


def damaged(folder: Path) -> dict[int, str]:
  """Returns {step: reason} of the folders in checkpoints/ that are not complete checkpoints."""
  found = {step: trouble(place) for step, place in sorted(_numbered(folder).items())}
  return {step: why for step, why in found.items() if why}


def listed(problems: Mapping[int, str]) -> str:
  """Joins problems, {step: reason} as `damaged` returns them, to one text."""
  return "; ".join(f"step {step} cannot be used: {why}" for step, why in sorted(problems.items()))
