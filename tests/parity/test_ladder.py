"""Every rung of the parity ladder stays within its tolerance."""

from __future__ import annotations

import itertools

import pytest

from tests.parity import cases, ladder

# Cases whose tensors and tokens show all that is their own; what follows is the same code for all.
SHORT = ("conv224", "dfi_only", "pooling_multiscale_dfi", "siglip27", "tfm336_pool")
LONG = ("logits_and_losses", "greedy")
SLOW = {
  *itertools.product(SHORT, LONG),
  ("cropping", "trajectory"),
  ("pooling", "hot_trajectory"),
  ("pooling", "trajectory"),
  ("tfm336_pool", "features"),
}
# What takes longest, or shows in one more case what a quick climb shows. (Ten steps of the optimizer
# show the same for each case and speed: one is climbed.)
GUARDS = {
  *itertools.product(("anyres", "baseline"), LONG),
  ("pooling", "gradients"),
  ("pooling_multiscale_dfi", "features"),
  ("cropping", "hot_trajectory"),
}
CLIMBS = [
  pytest.param(
    name,
    rung,
    marks=[
      *[pytest.mark.slow] * ((name, rung) in SLOW),
      *[pytest.mark.guard] * ((name, rung) in GUARDS),
    ],
  )
  for rung, (named, _) in ladder.RUNGS.items()
  for name in named
]


@pytest.mark.parametrize(("name", "rung"), CLIMBS)
def test_rung_is_within_its_tolerance(name: str, rung: str) -> None:
  results = list(ladder.RUNGS[rung][1](cases.case(name)))
  assert results, "a climb without rungs proves nothing"
  beyond = [
    f"{r.rung}: {r.max_abs_diff:.2e} > {r.tolerance:.0e}"
    for r in results
    if not r.max_abs_diff <= r.tolerance
  ]
  assert not beyond


def test_every_tolerance_has_a_rung_and_the_other_way_round() -> None:
  """The climbs name their rungs when they run; the exceptions must name existing ones."""
  for name, rung in ladder.EXCEPTIONS:
    assert name in cases.SPECS
    assert rung in ladder.TOLERANCES


def test_difference_sees_a_single_wrong_number() -> None:
  assert ladder.difference([1.0, 2.0], [1.0, 4.0]) == 0.5
