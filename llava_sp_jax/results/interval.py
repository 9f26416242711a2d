"""Computes confidence intervals of means."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

LEVEL, RESAMPLES, SEED = 0.95, 1000, 0


@dataclasses.dataclass(frozen=True)
class Interval:
  """Holds a mean with its confidence interval."""

  of: str  # what the mean is taken of
  mean: float
  low: float
  high: float
  level: float  # probability, e.g. 0.95
  method: str


def bootstrap(scores: Sequence[float], groups: Sequence[str]) -> Interval | None:
  """Returns the mean of `scores` with its 95% percentile-bootstrap interval; None for < 2 groups.

  Resamples `groups` (one for each score, e.g. its image) in place of scores, since answers about
  one image are not independent (cluster bootstrap: Davison and Hinkley 1997, section 3.8).
  """
  index = {name: i for i, name in enumerate(dict.fromkeys(groups))}
  if len(index) < 2:
    return None
  places = [index[name] for name in groups]
  sums = np.bincount(places, weights=scores)
  counts = np.bincount(places)
  rng = np.random.default_rng(SEED)
  means = np.empty(RESAMPLES)
  for i in range(RESAMPLES):
    drawn = rng.integers(len(index), size=len(index))
    means[i] = sums[drawn].sum() / counts[drawn].sum()
  low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
  return Interval(
    of="mean score of the answers",
    mean=float(np.mean(scores)),
    low=float(low),
    high=float(high),
    level=LEVEL,
    method=f"percentile bootstrap over {len(index)} images, {RESAMPLES} resamples, seed {SEED}",
  )


def of_mean(values: Sequence[float]) -> dict[str, float | None]:
  """Returns {mean, low, high} of independent values with Student's 95% interval.

  `low` and `high` are None for a single value.
  """
  mean = float(np.mean(values))
  if len(values) < 2:
    return {"mean": mean, "low": None, "high": None}
  from scipy import stats  # comes with jax

  half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
  return {"mean": mean, "low": float(mean - half), "high": float(mean + half)}
