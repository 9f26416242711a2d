"""README and docs hold no figure of ours that is not in a record under docs/results."""

from __future__ import annotations

import pytest

from tests import figures
from tests.conftest import REPOSITORY

FOUND = [figure for page in figures.PAGES for figure in figures.figures(page)]


def test_every_figure_has_a_record_or_a_reason() -> None:
  known = {*figures.RECORDED, *figures.STATED}
  unknown = [f"{f.page}:{f.line}: {f.text}" for f in FOUND if (f.page, f.text) not in known]
  assert not unknown, "put them into tests/figures.py, with the record that they come from"
  assert len(FOUND) > 20


def test_no_entry_is_left_of_a_figure_that_went() -> None:
  shown = {(f.page, f.text) for f in FOUND}
  assert {*figures.RECORDED, *figures.STATED} <= shown
  assert not set(figures.RECORDED) & set(figures.STATED)


@pytest.mark.parametrize("key", figures.RECORDED, ids=" ".join)
def test_a_figure_is_what_its_record_says(key: tuple[str, str]) -> None:
  value = figures.RECORDED[key]()
  assert figures.shown_as(value, key[1]), f"{key[0]} says {key[1]}, its record {value}"


def test_the_table_of_variants_is_that_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
  """With the differences to `none` and their intervals, which have no unit."""
  monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
  import ablation

  page = (REPOSITORY / "docs/variants.md").read_text()
  rows = {row["variant"]: row for row in ablation.summary(figures.result("easy_vqa_ablation"))}
  for name, row in rows.items():
    against = ["", ""]
    if paired := row["paired"]:
      against = [f"{paired['mean']:+.1f}", f"{paired['low']:+.1f} to {paired['high']:+.1f}"]
    cells = [f"`{name}`", f"{row['mean']:.1f}%", *against]
    line = " ".join(f"| {' | '.join(cells)} |".split())  # an empty cell is one blank
    assert line in page, line
  gain = rows["pooling"]["paired"]
  said = f"{gain['mean']:.1f} points more than `none`, 95% interval {gain['low']:.1f} to {gain['high']:.1f}"
  assert said in (REPOSITORY / "README.md").read_text()


def test_the_requests_of_all_hosts_follow_from_other_records(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
  import hosts

  held = figures.result("hosts")
  now = {name: round(value, 1) for name, value in hosts.requests(held["hosts"]).items()}
  assert held["asked"] == now, "scaling, packing or bucket_reading changed: make hosts anew"


def test_figures_are_found_and_compared() -> None:
  assert figures.FIGURE.findall("92.8% of 1,000 in .5 s, 2.5 GB, 3x, 10 steps, v5.2 GB") == [
    "92.8%",
    ".5 s",
    "2.5 GB",
    "3x",
  ]
  assert figures.shown_as(92.84, "92.8%")
  assert not figures.shown_as(92.86, "92.8%")
  assert figures.shown_as(1234.4, "1,234 s")
