"""The demo as a user starts it, and the data that it makes."""

from __future__ import annotations

import collections
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import REPOSITORY

TRAIN_IMAGES, TRAIN_QUESTIONS, TEST_IMAGES, TEST_QUESTIONS = 4000, 38575, 1000, 9673
ANSWERS = 13
# What a clone has and the demo does not need, or makes anew.
ASIDE = {".git", ".venv", ".cache", ".ci", "benchmarks", "data", "docs", "runs", "tests"}
# The environment of the tests in place of one that is made; what pip would install is there.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in "-m pip "*) exit 0 ;; esac
exec {sys.executable} "$@"
"""

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("easy_vqa") is None,
  reason="easy-vqa is not installed: pip install --no-deps easy-vqa==1.0",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The data set as `python scripts/prepare_easy_vqa.py` writes it."""
  out = tmp_path_factory.mktemp("easy_vqa") / "data"
  script = REPOSITORY / "scripts" / "prepare_easy_vqa.py"
  subprocess.run([sys.executable, script, "--out", out], check=True, cwd=REPOSITORY)
  return out


def test_the_data_is_whole(data: Path) -> None:
  captions, train, test = (
    json.loads((data / f"{name}.json").read_text()) for name in ("captions", "train", "test")
  )
  assert len(captions) == len(train) == TRAIN_IMAGES
  assert sum(len(s["conversations"]) for s in train) == 2 * TRAIN_QUESTIONS
  assert len(test) == len({q["id"] for q in test}) == TEST_QUESTIONS
  for split, samples, count in (("train", train, TRAIN_IMAGES), ("test", test, TEST_IMAGES)):
    files = {f"{split}/{path.name}" for path in (data / "images" / split).iterdir()}
    assert {s["image"] for s in samples} == files
    assert len(files) == count
  answers = collections.Counter(q["answer"] for q in test)
  assert len(answers) == ANSWERS
  readme = " ".join((REPOSITORY / "README.md").read_text().split())
  commonest = re.search(r"commonest answer alone: ([\d.]+)%", readme)
  assert commonest
  assert f"{100 * max(answers.values()) / len(test):.1f}" == commonest[1]


def test_data_that_is_there_is_left(data: Path, capfd: pytest.CaptureFixture) -> None:
  before = (data / "train.json").stat().st_mtime_ns
  script = REPOSITORY / "scripts" / "prepare_easy_vqa.py"
  subprocess.run([sys.executable, script, "--out", data], check=True, cwd=REPOSITORY)
  assert "already prepared" in capfd.readouterr().out
  assert (data / "train.json").stat().st_mtime_ns == before


@pytest.mark.guard
def test_the_demo_from_data_to_report(data: Path, tmp_path: Path) -> None:
  """A copy of the repository without git, both stages at a two-hundredth of their steps."""
  clone = tmp_path / "clone"
  clone.mkdir()
  for path in REPOSITORY.iterdir():
    if path.name not in ASIDE:
      (shutil.copytree if path.is_dir() else shutil.copy)(path, clone / path.name)
  python = clone / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text(PYTHON)
  python.chmod(0o755)
  runs = tmp_path / "runs"
  environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "VENV", "XLA_FLAGS")}
  done = subprocess.run(
    ["bash", "scripts/demo.sh", "--scale", "0.005", "--runs", runs, "--data", data],
    cwd=clone,
    env={**environment, "PYTHONPATH": str(clone)},
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    check=False,
  )
  assert done.returncode == 0, done.stdout
  (report,) = runs.glob("*/report")
  assert str(report / "report.md") in done.stdout
  record = json.loads((report / "record.json").read_text())
  assert (record["seed"], record["scale"]) == (0, 0.005)
  scores = json.loads((report.parent / "eval" / "scores.json").read_text())
  assert record["accuracy"] == scores["by_kind"]["all"]["accuracy"]
  assert scores["answered"] == TEST_QUESTIONS
  assert f"{100 * record['accuracy']:.2f}%" in done.stdout
  text = (report / "report.md").read_text()
  for name in ("loss.png", "accuracy.png", "answers.png"):
    assert name in text
    with Image.open(report / name) as picture:
      assert min(picture.size) > 200
      darkest, lightest = picture.convert("L").getextrema()
      assert darkest < lightest
