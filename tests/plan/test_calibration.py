"""The band beside a prediction: of published runs on the same chip, and of no other."""

from __future__ import annotations

import dataclasses
import math

import pytest

from llava_sp_jax.plan import calibration, explain, records, topologies
from tests.conftest import REPOSITORY
from tests.plan import published
from tests.plan.plans import GIB, plan
from tests.plan.test_compile import LIBTPU, planned

RUNS = [run for runs in calibration.RUNS.values() for run in runs]


def test_a_prediction_has_the_band_of_its_chip() -> None:
  made = plan(8 * GIB, seconds=2.0, useful_flops=1e18)
  low, high = calibration.band(made.topology, 2.0) or (math.nan, math.nan)
  ratios = sorted(run.ratio for run in calibration.RUNS["v5e"])
  assert (low, high) == (2 * ratios[0], 2 * ratios[-1])
  shown = calibration.text([low, high])
  assert f"step 2.0000 s predicted; {shown} s by published runs on v5e" in explain.text(made)
  record = made.record()
  assert record["step_seconds_published"] == [round(low, 4), round(high, 4)]
  cell = f"| 2.0 | {shown} |"
  assert cell in records.table([record])
  older = {key: value for key, value in record.items() if key != "step_seconds_published"}
  assert cell in records.table([older])


def test_a_band_of_one_run_is_a_number() -> None:
  assert calibration.text([1.1004, 1.1]) == "1.1"
  assert calibration.text([0.1112, 0.1405]) == "0.111 - 0.141"


def test_what_has_no_published_run_has_no_band() -> None:
  made = dataclasses.replace(plan(8 * GIB, useful_flops=1e18), topology=topologies.topology("v4-8"))
  assert calibration.band(made.topology, 1.0) is None
  assert made.record()["step_seconds_published"] is None
  assert "no published run on v4" in explain.text(made)
  large = plan(20 * GIB).record()
  assert large["step_seconds_published"] is None
  assert "does not fit | - |" in records.table([large])


def test_published_runs_are_of_known_slices_and_name_their_source() -> None:
  for chip, runs in calibration.RUNS.items():
    for run in runs:
      assert topologies.topology(run.slice_name).chip_name == chip
      assert run.source.startswith("https://")
      assert 0.5 < run.ratio < 2


def test_the_page_has_the_table() -> None:
  assert calibration.table() in (REPOSITORY / "docs/pods.md").read_text()


@pytest.mark.slow
@LIBTPU
@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.decoder}-{run.slice_name}")
def test_a_published_step_is_predicted_as_the_table_says(run: calibration.Run) -> None:
  found = planned(published.config(run), "train", run.slice_name)
  assert found.fits
  rate = found.tokens / found.topology.chips / found.seconds
  assert rate == pytest.approx(run.predicted, rel=0.03)
