"""The twelve benchmarks of the paper on synthetic files: answered, scored, and counted in advance."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from llava_sp_jax import cli
from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import runs
from llava_sp_jax.eval import absent
from llava_sp_jax.tasks.catalog import BENCHMARKS
from tests.conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import paper_evaluation
import paper_files
import paper_folder

NAMES = [task.name for task in BENCHMARKS]
SHARE = 0.0005


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("paper")
  paper_files.write(folder, SHARE)
  return folder


@pytest.mark.guard
def test_all_twelve_are_answered_and_scored(files: Path, run_folder: Path, tmp_path: Path) -> None:
  options = [f"--checkpoint={run_folder}", f"--data={files}", "--max-new-tokens=2"]
  assert cli.main(["eval", *options, f"--task={','.join(NAMES)}", f"--out={tmp_path}"]) == 0
  found = paper_evaluation.ran(tmp_path)
  assert set(found) == set(NAMES)
  made = paper_folder.Files(tmp_path / "again", SHARE)
  for name, counts in found.items():
    asked = json.loads((tmp_path / name / "scores.json").read_text())["asked"]
    assert counts["questions"] == asked
    assert counts["failed"] == 0
    assert counts["scored"]
    assert abs(counts["questions"] - made.size(name)[0]) <= 3  # POPE has thirds, MME has pairs


@pytest.mark.guard
def test_a_part_of_the_questions_is_counted(files: Path, run_folder: Path) -> None:
  config = runs.read_config(run_folder)
  data = {"config.data.tokenizer": str(run_folder / "tokenizer")}
  config = config_lib.override(config, data)
  tasks = dict.fromkeys(("vqav2", "mmvet"), str(files))
  found = absent.counted(config, tasks, (2, 1, 1), 4, {"vqav2": 3, "mmvet": 5}, parts=2)
  assert 20 <= found["vqav2"].questions <= 34  # half of 54; an image's questions stay together
  assert found["vqav2"].tokens == 3 * found["vqav2"].questions
  runs_of = found["vqav2"].runs
  assert sum(n for key, n in runs_of.items() if key[0] == "encode") >= found["vqav2"].images / 2


def test_the_page_says_what_was_predicted_and_what_ran() -> None:
  task = {"questions": 1, "failed": 0, "images": 36, "tokens": 3, "hours": 0.5}
  one = {
    "way": "w",
    "rows": 2,
    "tasks": {"vqav2": {**task, "share": {"grow": 0.75, "decode": 0.25}}},
  }
  record = {
    "pod": "p", "hosts": 4, "chips": "c", "compiler": "x", "ways": [one], "sizes":
    {"vqav2": vars(paper_folder.SIZES["vqav2"])}, "ran": {},
  }  # fmt: skip
  text = paper_evaluation.page(record)
  assert "## w, 2 rows: 0.50 hours (30.0 minutes)" in text
  assert "| vqav2 | 107,394 | 36,807 | 3 | 30.00 | 0% | 75% | 0% | 25% | 0 |" in text
  ran = {"vqav2": {"questions": 5, "failed": 1, "seconds": 2.0, "scored": True}}
  assert "answered all 5 questions" in paper_evaluation.page({**record, "ran": ran})
