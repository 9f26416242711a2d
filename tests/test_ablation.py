"""The table over variants and seeds: what it does, what it will cost, what it says; no model trains."""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import provenance, recipes
from llava_sp_jax.results import interval
from tests.conftest import REPOSITORY

ACCURACY = {"none": (0.80, 0.82, 0.81), "pooling": (0.83, 0.84, 0.86)}
Calls = list[tuple[str, int]]
BARE = functools.cache(provenance.bare)  # a source is parsed once, not once a record


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
  """(ablation, run_easy_vqa, what was trained) with runs that only write their record."""
  monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
  import ablation
  import run_easy_vqa

  called: Calls = []

  def run(job: Any, runs: Path, data: str, cores: Any, log: Path) -> Path:
    called.append((job.variant, job.seed))
    report = runs / job.name / "report"
    report.mkdir(parents=True)
    accuracy = ACCURACY[job.variant][job.seed]
    record = {
      "variant": job.variant,
      "seed": job.seed,
      "scale": job.scale,
      "accuracy": accuracy,
      "by_kind": {"shape": accuracy - 0.1, "colour": 1.0},
      "seconds": 100,
    }
    (report / "record.json").write_text(json.dumps(record))
    return report

  monkeypatch.setattr(ablation, "run", run)
  monkeypatch.setattr(provenance, "bare", BARE)
  monkeypatch.chdir(tmp_path)  # no other records
  monkeypatch.setattr(ablation, "command", lambda *_, **__: None)
  yield ablation, run_easy_vqa, called
  for name in ("ablation", "run_easy_vqa"):
    sys.modules.pop(name, None)


def start(ablation: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, *more: str) -> None:
  argv = [
    "ablation.py",
    "--variants",
    "none",
    "pooling",
    "--scale",
    "0.5",
    "--out",
    str(folder / "table"),
    "--runs",
    str(folder / "runs"),
    *more,
  ]
  monkeypatch.setattr(sys, "argv", argv)
  ablation.main()


def test_it_goes_on_from_its_records(
  scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  ablation, _, called = scripts
  start(ablation, monkeypatch, tmp_path, "--seeds", "2", "--dry-run")
  assert "4 runs, 0 of them on record for these sources; 4 to do" in capsys.readouterr().out
  assert not called
  start(ablation, monkeypatch, tmp_path, "--seeds", "2")
  assert called == [("none", 0), ("pooling", 0), ("none", 1), ("pooling", 1)]
  start(ablation, monkeypatch, tmp_path, "--seeds", "3", "--dry-run")
  said = capsys.readouterr().out
  assert (
    "6 runs, 4 of them on record for these sources; 2 to do, about 3 minutes by the records of"
    in said
  )
  start(ablation, monkeypatch, tmp_path, "--seeds", "3", "--at-once", "2")
  assert sorted(called[4:]) == [("none", 2), ("pooling", 2)]
  held = json.loads((tmp_path / "table.json").read_text())
  assert len(held["figures"]) == 6
  assert {"commit", "sources", "versions", "machine", "command", "when"} <= set(held["figures"][0])
  assert list(held["sources"]) == [held["figures"][0]["sources"]]
  plain = ablation.provenance.digest
  monkeypatch.setattr(ablation.provenance, "digest", lambda found: f"other {plain(found)}")
  start(ablation, monkeypatch, tmp_path, "--seeds", "3", "--dry-run")
  assert "6 runs, 0 of them on record" in capsys.readouterr().out


def test_means_and_paired_differences(
  scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  ablation, _, _ = scripts
  start(ablation, monkeypatch, tmp_path, "--seeds", "3")
  page = (tmp_path / "table.md").read_text()
  assert "| none | 3 | 81.00% | 78.52 to 83.48 | 80.00% | 82.00% | - | - |" in page
  # 3, 2 and 5 points above: mean 10/3, s = 1.5275, t(2) = 4.3027
  assert (
    "| pooling | 3 | 84.33% | 80.54 to 88.13 | 83.00% | 86.00% | +3.33 | -0.46 to 7.13 |" in page
  )
  assert "![mean and interval of each variant](table.png)" in page
  assert (tmp_path / "table.png").stat().st_size > 5000


def test_a_run_that_fails_costs_no_other(
  scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  ablation, _, called = scripts
  whole = ablation.run

  def run(job: Any, *rest: Any) -> Path:
    if (job.variant, job.seed) == ("none", 0):
      raise SystemExit("llava-sp train: ended with code 1")
    return whole(job, *rest)

  monkeypatch.setattr(ablation, "run", run)
  with pytest.raises(SystemExit, match="1 of 4 runs failed: none-0: llava-sp train"):
    start(ablation, monkeypatch, tmp_path, "--seeds", "2")
  held = json.loads((tmp_path / "table.json").read_text())
  assert len(held["figures"]) == len(called) == 3


def test_where_a_record_cannot_be_kept_no_other_run_begins(
  scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  """And a run that ended without its record is recorded by the next command, not done again."""
  ablation, _, called = scripts
  begun, whole = threading.Event(), ablation.run

  def run(job: Any, *rest: Any) -> Path:
    report = whole(job, *rest)
    if len(called) > 1:  # the second goes on while the first is recorded
      begun.set()
      time.sleep(1)
    return report

  def full(*_: object) -> None:
    begun.wait()
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(ablation, "run", run)
  with monkeypatch.context() as patched:
    patched.setattr(ablation.Book, "add", full)
    with pytest.raises(OSError, match="No space left"):
      start(ablation, monkeypatch, tmp_path, "--seeds", "3")
  assert called == [("none", 0), ("pooling", 0)], "four more would have begun"
  start(ablation, monkeypatch, tmp_path, "--seeds", "1")
  assert len(called) == 2
  assert len(json.loads((tmp_path / "table.json").read_text())["figures"]) == 2


def test_records_of_other_sources_are_not_compared(
  scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  ablation, _, _ = scripts
  start(ablation, monkeypatch, tmp_path, "--seeds", "2")
  table = tmp_path / "table.json"
  held = json.loads(table.read_text())
  for record in held["figures"]:
    if record["variant"] == "none":
      record["sources"] = "older"
  table.write_text(json.dumps(held))
  book = ablation.Book(tmp_path / "table")
  assert [r["variant"] for r in book.records if r["sources"] in book.same] == ["pooling"] * 2
  page = ablation.show(book, ablation.parse(["--scale", "0.5", "--out", str(tmp_path / "table")]))
  assert "| pooling | 2 | 83.50%" in page
  assert "| none |" not in page


def test_records_that_a_canary_confirmed_stay_beside_new_ones(
  scripts: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  ablation, _, called = scripts
  start(ablation, monkeypatch, tmp_path, "--seeds", "1")
  table = tmp_path / "table.json"
  held = json.loads(table.read_text())
  now = held["figures"][0]["sources"]
  for record in held["figures"]:
    record["sources"] = "older"
  held |= {"sources": {"older": {}}, "canary": "abc", "confirmed": {"sources": now}}
  table.write_text(json.dumps(held))
  start(ablation, monkeypatch, tmp_path, "--seeds", "2")
  assert called[2:] == [("none", 1), ("pooling", 1)]
  held = json.loads(table.read_text())
  assert (held["canary"], held["confirmed"]) == ("abc", {"sources": now})
  assert "| pooling | 2 |" in (tmp_path / "table.md").read_text()


def test_student_s_interval() -> None:
  assert interval.of_mean([2.0]) == {"mean": 2.0, "low": None, "high": None}
  found = interval.of_mean([1.0, 2.0, 3.0, 4.0])  # s = 1.2910, t(3) = 3.1824
  assert found["mean"] == 2.5
  assert found["low"] == pytest.approx(2.5 - 3.182446 * 1.290994 / 2, abs=1e-5)
  assert found["high"] == pytest.approx(2.5 + 3.182446 * 1.290994 / 2, abs=1e-5)


def test_any_variant_and_any_scales(scripts: Any) -> None:
  _, run_easy_vqa, _ = scripts
  for text, variant, scales in (
    ("cropping@2+4+8", "cropping", (2, 4, 8)),
    ("both", "both", ()),
    ("register", "register", ()),
    ("none", "none", ()),
  ):
    job = run_easy_vqa.Job(text, 3, 0.5)
    config = recipes.load(f"{REPOSITORY}/configs/easy_vqa.py:stage=pretrain,{job.options}")
    assert (config.model.projector.variant, config.model.projector.scales) == (variant, scales)
    assert config.train.seed == 3
    assert config.train.steps == 3500


def test_a_finished_run_of_other_sources_is_not_shown_as_today_s(
  scripts: Any, tmp_path: Path
) -> None:
  _, run_easy_vqa, _ = scripts
  record = tmp_path / "record.json"
  run_easy_vqa.refuse_older(tmp_path, record)  # begins
  record.write_text("{}")
  run_easy_vqa.refuse_older(tmp_path, record)  # is shown again
  (tmp_path / run_easy_vqa.SOURCES).write_text("of another commit\n")
  with pytest.raises(SystemExit, match="finished, but by other sources than these"):
    run_easy_vqa.refuse_older(tmp_path, record)


def test_the_demo_says_when_it_misses_its_promise(scripts: Any) -> None:
  _, run_easy_vqa, _ = scripts
  job, long = run_easy_vqa.Job("pooling", 0, 1.0), run_easy_vqa.Job("pooling", 0, 3.0)
  assert "62.93% of the answers are right, where README promises at least 90%" in (
    run_easy_vqa.broken_promise(job, 0.6293)
  )
  assert not run_easy_vqa.broken_promise(job, 0.90)
  assert "promises at least 99%" in run_easy_vqa.broken_promise(long, 0.98)
  assert not run_easy_vqa.broken_promise(run_easy_vqa.Job("pooling", 0, 0.2), 0.5)
  assert not run_easy_vqa.broken_promise(run_easy_vqa.Job("none", 0, 1.0), 0.5)
  readme = (REPOSITORY / "README.md").read_text()
  for scale, share in run_easy_vqa.PROMISED:
    assert f"at least {share:.0%}" in " ".join(readme.split()), scale
