"""Intervals draw images; means by kind count what was answered."""

from __future__ import annotations

import pytest

from llava_sp_jax.results import interval
from llava_sp_jax.tasks.task import Item, Prediction, mean_by_kind


def test_the_interval_covers_the_mean_and_draws_images() -> None:
  """Scores that agree within an image are less sure than as many independent ones."""
  scores = [float(i // 10 % 3 > 0) for i in range(600)]
  together = interval.bootstrap(scores, [str(i // 10) for i in range(600)])
  apart = interval.bootstrap(scores, [str(i) for i in range(600)])
  assert together is not None
  assert apart is not None
  assert together.mean == apart.mean == pytest.approx(2 / 3)
  assert together.low < apart.low < 2 / 3 < apart.high < together.high
  # The standard error of a mean of 60 images is sqrt(2/9/60) = .061; the interval is +-1.96 of it.
  assert together.high - together.low == pytest.approx(2 * 1.96 * 0.0609, rel=0.15)
  assert interval.bootstrap([1.0, 0.0], ["a", "a"]) is None


def test_means_by_kind_count_what_was_answered() -> None:
  items = [Item(str(i), "q", (), kind, "red") for i, kind in enumerate(["shape"] * 3 + ["colour"])]
  predictions = {
    "0": Prediction("0", "red"),
    "1": Prediction("1", "blue"),
    "2": Prediction("2", "red", error="no such file"),
  }
  assert mean_by_kind(items, predictions, lambda i, t: {"score": t == i.truth}) == {
    "all": {"accuracy": 0.5, "items": 2, "asked": 4},
    "shape": {"accuracy": 0.5, "items": 2, "asked": 3},
    "colour": {"accuracy": 0.0, "items": 0, "asked": 1},
  }
