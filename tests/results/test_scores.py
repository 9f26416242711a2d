"""scores.json: what is written is what is read, also of an older version."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.eval import run
from llava_sp_jax.results import scores as scores_lib
from llava_sp_jax.results import tables
from llava_sp_jax.results.interval import Interval
from llava_sp_jax.results.scores import BenchmarkScores
from llava_sp_jax.tasks.easy_vqa import EasyVqa
from tests.conftest import REPOSITORY
from tests.eval.scripted import Scripted


@pytest.fixture
def scored(tiny_data: Path, tmp_path: Path) -> tuple[BenchmarkScores, Path]:
  """Scores with every part: a failure, an interval, a comparison."""
  task, before, out = EasyVqa(tiny_data), tmp_path / "before", tmp_path / "out"
  run.run(task, Scripted(texts=["yes"]), before)
  engine = Scripted(texts=["no", "yes"], fails={"3.png": "no such file"})
  found = run.run(task, engine, out, compare=before)
  assert isinstance(found, BenchmarkScores)
  return found, out / scores_lib.FILE


def test_what_is_written_is_read(scored: tuple[BenchmarkScores, Path], tmp_path: Path) -> None:
  scores, path = scored
  assert scores.failures
  assert scores.interval
  assert scores.compared
  assert scores_lib.read(path) == scores
  scores_lib.write(tmp_path / "again.json", scores_lib.read(path))
  assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_keys_that_came_later_are_not_needed(scored: tuple[BenchmarkScores, Path]) -> None:
  scores, path = scored
  values: dict[str, Any] = json.loads(path.read_text())
  path.write_text(json.dumps({key: values[key] for key in scores_lib.SCHEMA} | {"odd": 1}))
  older = scores_lib.read(path)
  assert tables.headline(older) == tables.headline(scores)
  assert tables.coverage(older) == tables.coverage(scores)
  assert tables.cells(older) == tables.cells(scores)
  assert (older.answered, older.questions, older.variant) == (scores.answered, 12, {})
  assert older.checkpoint is older.step is older.model is older.compared is None


def test_an_interval_stands_beside_its_own_mean(scored: tuple[BenchmarkScores, Path]) -> None:
  """It would contradict a headline that is no mean of the answers, such as POPE's F1."""
  sure = Interval("mean score of the answers", 0.4, 0.35, 0.45, 0.95, "bootstrap")
  metric = "mean F1"
  scores = dataclasses.replace(scored[0], headline=0.57, metric=metric, interval=sure)
  head, (row,) = tables.together([scores])
  said = dict(zip(head, row, strict=True))
  assert said["score"] == "57.00% mean F1"
  assert said["mean score of the answers, 95% interval"] == "40.00%, 35.00% to 45.00%"


@pytest.mark.parametrize(
  "path", sorted((REPOSITORY / "docs/results").rglob("scores.json")), ids=lambda p: p.parent.name
)
def test_published_scores_are_written_as_they_were(path: Path, tmp_path: Path) -> None:
  """But for `left_out`, which two of them are older than."""
  scores_lib.write(tmp_path / "again.json", scores_lib.read(path))
  before, after = (json.loads(file.read_text()) for file in (path, tmp_path / "again.json"))
  assert {"left_out": [], **before} == after
  assert list(before) == [key for key in after if key in before]
