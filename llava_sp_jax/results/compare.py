"""Compares the answers of two runs to the same questions: fixed, broken, changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava_sp_jax.results import predictions
from llava_sp_jax.results.predictions import Record
from llava_sp_jax.tasks.task import EvalError

SAME = ("task", "data_hash")  # settings that must be equal for a comparison


@dataclasses.dataclass(frozen=True)
class Flip:
  """Holds the answers of two runs to one question, which differ in text or score."""

  here: Record  # of this run
  there: Record  # of the other run


@dataclasses.dataclass(frozen=True)
class Compared:
  """Counts the differences between the answers of this run and those of another one."""

  folder: str  # of the other run
  both: int  # questions that both runs answered
  fixed: int
  broken: int
  changed: int
  p_value: float  # of McNemar's exact test


@dataclasses.dataclass(frozen=True)
class Flips:
  """Holds the differences between this run and another one."""

  folder: str  # of the other run
  fixed: list[Flip]  # answers with a higher score than in the other run
  broken: list[Flip]  # answers with a lower score
  changed: list[Flip]  # answers with another text and the same score, or none
  both: int  # questions that both runs answered
  notes: tuple[str, ...]  # differences between the settings of the two runs

  @property
  def p_value(self) -> float:
    """Returns the p-value of McNemar's exact two-sided test.

    Its hypothesis is that an answer that flips is fixed or broken with equal probability.
    """
    n = len(self.fixed) + len(self.broken)
    ways = tail = 1  # binomial coefficients, updated step by step: math.comb of each is slow
    for k in range(min(len(self.fixed), len(self.broken))):
      ways = ways * (n - k) // (k + 1)
      tail += ways
    result: float = min(1.0, 2 * tail / 2**n)
    return result

  def counts(self) -> Compared:
    """Returns how many answers were fixed, broken and changed, and the p-value."""
    return Compared(
      folder=self.folder,
      both=self.both,
      fixed=len(self.fixed),
      broken=len(self.broken),
      changed=len(self.changed),
      p_value=self.p_value,
    )


def check(settings: Mapping[str, Any], there: Path) -> None:
  """Checks that another run, in the result folder `there`, can be compared with one of `settings`.

  Raises: EvalError when `there` is not a result folder, or holds answers to other questions.
  """
  other = predictions.read_settings(there)["settings"]
  if different := [
    f"{k}: {settings[k]!r} here, {other.get(k)!r} there"
    for k in SAME
    if settings[k] != other.get(k)
  ]:
    raise EvalError(f"--compare {there}: answers to other questions ({'; '.join(different)})")


def compare(here: Path, there: Path) -> Flips:
  """Compares the answers in two result folders, of this run and of another one.

  Raises: EvalError when `there` is not a result folder, or holds answers to other questions.
  """
  settings, other = (predictions.read_settings(folder)["settings"] for folder in (here, there))
  check(settings, there)
  notes = tuple(predictions.differences(settings, other))
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
