"""Against the original's scorers and converters: every figure, every verdict, every file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.tasks import scoring
from llava_sp_jax.tasks.gqa import Gqa
from llava_sp_jax.tasks.mmbench import MmBench
from llava_sp_jax.tasks.mmvet import MmVet
from llava_sp_jax.tasks.pope import Pope
from llava_sp_jax.tasks.scienceqa import ScienceQa
from llava_sp_jax.tasks.seed import Seed
from llava_sp_jax.tasks.task import Prediction
from llava_sp_jax.tasks.textvqa import TextVqa
from llava_sp_jax.tasks.vizwiz import VizWiz
from llava_sp_jax.tasks.vqav2 import VqaV2
from tests.conftest import REPOSITORY
from tests.tasks.formats import SHORT, lines, whole

GOLDEN = REPOSITORY / "tests/golden/scorers"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


def rows(name: str) -> list[dict[str, Any]]:
  """Lines of a file of the original's; the broken ones, which it skips, left out."""
  result = []
  for line in (GOLDEN / name).read_text().splitlines():
    try:
      result.append(json.loads(line))
    except ValueError:
      continue
  return result


def predictions(answers: list[dict[str, Any]], prefix: str = "") -> dict[str, Prediction]:
  ids = [f"{prefix}{row['question_id']}" for row in answers]
  return {i: Prediction(i, row["text"]) for i, row in zip(ids, answers, strict=True)}


@pytest.mark.parametrize("case", EXPECTED["answer_processor"], ids=lambda c: repr(c["text"])[:30])
def test_answers_are_normalized_as_the_original_does(case: dict[str, str]) -> None:
  assert scoring.vqa_normal(case["text"]) == case["out"]


@pytest.mark.parametrize("case", EXPECTED["pope_parse"], ids=lambda c: repr(c["text"])[:30])
def test_yes_and_no_are_read_as_the_original_does(case: dict[str, str]) -> None:
  assert scoring.pope_answer(case["text"]) == case["verdict"]


def test_pope(tmp_path: Path) -> None:
  shutil.copytree(GOLDEN / "pope/ann", tmp_path / "coco")
  shutil.copy(GOLDEN / "pope/questions.jsonl", tmp_path / "llava_pope_test.jsonl")
  task = Pope(tmp_path)
  scores = task.score(task.items(), predictions(rows("pope/answers.jsonl")))
  blocks = EXPECTED["pope"]["stdout"].split("====================================\n")[:3]
  means = []
  for block in blocks:
    told = re.search(r"Category: (\w+), # samples: (\d+)", block)
    assert told
    ours = scores.by_kind[told[1]]
    assert ours["items"] == ours["asked"] == int(told[2])
    counts = block.split("\n")[2].split("\t")
    assert [ours[name] for name in ("TP", "FP", "TN", "FN")] == [int(c) for c in counts]
    for title, name in (
      ("Accuracy", "accuracy"),
      ("Precision", "precision"),
      ("Recall", "recall"),
      ("F1 score", "f1"),
      ("Yes ratio", "yes_ratio"),
    ):
      found = re.search(rf"{title}: (\S+)", block)
      assert found
      assert ours[name] == float(found[1])
    means.append(ours["f1"])
  assert scores.headline == pytest.approx(sum(means) / 3, abs=1e-15)


def test_scienceqa(tmp_path: Path) -> None:
  shutil.copytree(GOLDEN / "sqa/base", tmp_path, dirs_exist_ok=True)
  answers = {row["question_id"]: row for row in rows("sqa/answers.jsonl")}
  problems = json.loads((GOLDEN / "sqa/base/problems.json").read_text())
  asked = []
  for key, problem in problems.items():
    # where there is no answer, the original knows no prompt
    prompt = answers[key]["prompt"] if key in answers else problem["question"]
    row: dict[str, Any] = {"id": key, "conversations": [{"from": "human", "value": prompt}]}
    asked.append({**row, "image": f"{key}/image.png"} if "<image>" in prompt else row)
  whole(tmp_path / "llava_test_CQM-A.json", asked)
  task = ScienceQa(tmp_path)
  items = task.items()
  given = predictions(list(answers.values()))
  scores = task.score(items, given)
  told = re.search(
    r"Total: (\d+), Correct: (\d+), Accuracy: (\S+)%, IMG-Accuracy: (\S+)%",
    EXPECTED["sqa"]["stdout"],
  )
  assert told
  whole_split = scores.by_kind["all"]
  assert whole_split["items"] == int(told[1])
  assert f"{100 * whole_split['accuracy']:.2f}" == told[3]
  assert f"{100 * (scores.headline or 0):.2f}" == told[4]
  result = json.loads((GOLDEN / "sqa/out_result.json").read_text())
  assert 100 * whole_split["accuracy"] == pytest.approx(result["acc"], abs=1e-12)
  detail = json.loads((GOLDEN / "sqa/out_detail.json").read_text())
  parsed = {
    row["question_id"]: (row["parsed_ans"], row["ground_truth"], right)
    for right, name in ((1.0, "correct"), (0.0, "incorrect"))
    for row in detail[name]
  }
  assert len(parsed) == len(items) == 44
  for item in items:
    verdict = task.verdict(item, given[item.id].text if item.id in given else "FAILED")
    assert verdict["index"] == result["results"][item.id]
    assert (verdict["read"], item.truth, verdict["score"]) == parsed[item.id]


def test_textvqa(tmp_path: Path) -> None:
  shutil.copy(GOLDEN / "textvqa/annotations.json", tmp_path / "TextVQA_0.5.1_val.json")
  answers = rows("textvqa/answers.jsonl")
  lines(
    tmp_path / "llava_textvqa_val_v051_ocr.jsonl",
    [{"question_id": r["question_id"], "image": "x.jpg", "text": r["prompt"]} for r in answers],
  )
  task = TextVqa(tmp_path)
  items = task.items()
  ours = [task.verdict(i, r["text"])["score"] for i, r in zip(items, answers, strict=True)]
  assert ours == EXPECTED["textvqa_scores"]
  given = {i.id: Prediction(i.id, r["text"]) for i, r in zip(items, answers, strict=True)}
  scores = task.score(items, given)
  assert f"Samples: {scores.by_kind['all']['items']}\n" in EXPECTED["textvqa"]["stdout"]
  assert f"Accuracy: {100 * (scores.headline or 0):.2f}%" in EXPECTED["textvqa"]["stdout"]


def test_vqav2(tmp_path: Path) -> None:
  name = "llava_vqav2_mscoco_test2015.jsonl"
  shutil.copy(GOLDEN / "vqav2" / name, tmp_path / name)
  shutil.copy(GOLDEN / "vqav2" / name, tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl")
  task = VqaV2(tmp_path)
  items, given = task.items(), predictions(rows("vqav2/answers/s/ck/merge.jsonl"))
  scores = task.score(items, given)
  counts = scores.by_kind["all"]
  told = f"total results: {counts['items']}, total split: {counts['asked']}, error_line: 1\n"
  assert told == EXPECTED["vqav2"]["stdout"]
  assert scores.headline is None
  (file,) = task.submission(items, given, tmp_path / "out")
  assert file.read_text() == (GOLDEN / "vqav2/answers_upload/s/ck.json").read_text()


def test_vizwiz(tmp_path: Path) -> None:
  shutil.copy(GOLDEN / "vizwiz/ann.jsonl", tmp_path / "llava_test.jsonl")
  task = VizWiz(tmp_path)
  given = predictions(rows("vizwiz/answers.jsonl"))
  (file,) = task.submission(task.items(), given, tmp_path / "out")
  assert file.read_text() == (GOLDEN / "vizwiz/upload/out.json").read_text()


def test_gqa(tmp_path: Path) -> None:
  answers = rows("gqa/answers.jsonl")
  asked = [{"question_id": r["question_id"], "image": "x.jpg", "text": SHORT} for r in answers]
  lines(tmp_path / "llava_gqa_testdev_balanced.jsonl", asked)
  task = Gqa(tmp_path)
  items = task.items()
  (file,) = task.submission(items, predictions(answers), tmp_path / "out")
  assert file.read_text() == (GOLDEN / "gqa/out.json").read_text()
  assert task.score(items, predictions(answers)).headline is None  # there is no truth


def test_mmvet(tmp_path: Path) -> None:
  answers = rows("mmvet/answers.jsonl")
  asked = [{"question_id": r["question_id"], "image": "x.jpg", "text": "q"} for r in answers]
  lines(tmp_path / "llava-mm-vet.jsonl", asked)
  task = MmVet(tmp_path)
  (file,) = task.submission(task.items(), predictions(answers, "v1_"), tmp_path / "out")
  assert file.read_text() == (GOLDEN / "mmvet/out.json").read_text()


def test_seed(tmp_path: Path) -> None:
  shutil.copy(GOLDEN / "seed/ann.json", tmp_path / "SEED-Bench.json")
  answers = rows("seed/answers.jsonl")
  asked = [{"question_id": r["question_id"], "image": "x.jpg", "text": "q"} for r in answers]
  lines(tmp_path / "llava-seed-bench.jsonl", asked)
  task = Seed(tmp_path, split="all")
  items, given = task.items(), predictions(answers)
  by_kind = task.score(items, given).by_kind
  names = {"Total accuracy": "all", "image accuracy": "image", "video accuracy": "video"}
  told = dict(line.split(": ") for line in EXPECTED["seed"]["stdout"].splitlines())
  assert set(names) < set(told)
  assert len(told) == len(by_kind)
  for title, value in told.items():
    assert f"{100 * by_kind[names.get(title, title)]['accuracy']:.2f}%" == value, title
  (file,) = task.submission(items, given, tmp_path / "out")
  assert file.read_text() == (GOLDEN / "seed/out.jsonl").read_text()
  images = Seed(tmp_path)
  only = images.score(images.items(), given)
  assert f"{100 * (only.headline or 0):.2f}%" == told["image accuracy"]


def test_mmbench(tmp_path: Path) -> None:
  openpyxl = pytest.importorskip("openpyxl", reason="the extra xlsx is not installed")
  shutil.copy(GOLDEN / "mmbench/ann.tsv", tmp_path / "mmbench_dev_20230712.tsv")
  task = MmBench(tmp_path)
  items = task.items()
  (file,) = task.submission(items, predictions(rows("mmbench/answers/ex.jsonl")), tmp_path / "out")
  header, *table = openpyxl.load_workbook(file).active.iter_rows(values_only=True)
  assert list(header) == EXPECTED["mmbench"]["sheet"]["columns"]
  assert [list(row) for row in table] == EXPECTED["mmbench"]["sheet"]["rows"]
