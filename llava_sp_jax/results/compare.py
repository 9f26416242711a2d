"""What another run answers otherwise: fixed, broken, changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_sp_jax.results import predictions
from llava_sp_jax.results.predictions import Record
from llava_sp_jax.tasks.task import EvalError

SAME = ("task", "data_hash")  # settings that two runs on the same questions share


@dataclasses.dataclass(frozen=True)
class Flip:
  """One question that two runs answer otherwise; `here` is the newer answer."""

  here: Record
  there: Record


@dataclasses.dataclass(frozen=True)
class Flips:
  """Answers with a better score than in the other run, with a worse one, with other words only."""

  folder: str  # of the other run
  fixed: list[Flip]
  broken: list[Flip]
  changed: list[Flip]
  both: int  # questions that both have answered
  notes: tuple[str, ...]  # in which settings the two runs differ

  @property
  def p_value(self) -> float:
    """Of fixed and broken being equally likely: McNemar's test, exact and two-sided."""
    n = len(self.fixed) + len(self.broken)
    ways = tail = 1  # of k among n: multiplied up, since math.comb of each is slow for thousands
    for k in range(min(len(self.fixed), len(self.broken))):
      ways = ways * (n - k) // (k + 1)
      tail += ways
    return min(1.0, 2 * tail / 2**n)

  def counts(self) -> dict[str, float | int | str]:
    """For scores.json."""
    return {
      "folder": self.folder,
      "both": self.both,
      "fixed": len(self.fixed),
      "broken": len(self.broken),
      "changed": len(self.changed),
      "p_value": self.p_value,
    }


def check(mine: Mapping[str, Any], there: Path) -> None:
  """Raises: EvalError when `there` is no result folder, or holds answers to other questions than a
  run of these settings."""
  other = predictions.read_settings(there)["settings"]
  if different := [
    f"{k}: {mine[k]!r} here, {other.get(k)!r} there" for k in SAME if mine[k] != other.get(k)
  ]:
    raise EvalError(f"--compare {there}: answers to other questions ({'; '.join(different)})")


def compare(here: Path, there: Path) -> Flips:
  """Raises: EvalError, see `check`."""
  mine, other = (predictions.read_settings(folder)["settings"] for folder in (here, there))
  check(mine, there)
  notes = tuple(predictions.differences(mine, other))
  records, before = predictions.read(here), predictions.read(there)
  groups: dict[str, list[Flip]] = {"fixed": [], "broken": [], "changed": []}
  both = 0
  for key, record in records.items():
    old = before.get(key)
    if old is None or old["error"] or record["error"]:
      continue
    both += 1
    now, then = (r["verdict"].get("score") for r in (record, old))
    if now is not None and then is not None and now != then:
      groups["fixed" if now > then else "broken"].append(Flip(record, old))
    elif record["text"] != old["text"]:
      groups["changed"].append(Flip(record, old))
  return Flips(str(there), **groups, both=both, notes=notes)
