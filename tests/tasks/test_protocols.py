"""What each benchmark asks under its protocols, and rules that only one of them has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_sp_jax.tasks.benchmark import LETTER, SHORT
from llava_sp_jax.tasks.catalog import TASKS
from llava_sp_jax.tasks.task import Prediction
from tests.tasks.formats import RIGHT, answers

# --- what each asks ---


def questions(root: Path, name: str, protocol: str = "llava", **options: Any) -> list[str]:
  return [item.question for item in TASKS[name](root, protocol=protocol, **options).items()]


def test_textvqa_s_protocols_differ_in_the_prompt(root: Path) -> None:
  ocr = "Reference OCR token: NIKON, D5"
  assert questions(root, "textvqa") == [
    f"What BRAND is it?\n{ocr}\n{SHORT}",
    f"{ocr}\nWhat is the time?\n{SHORT}",
  ]
  assert questions(root, "textvqa", "llava_no_ocr")[0] == f"What BRAND is it?\n{SHORT}"
  assert questions(root, "textvqa", "llava_no_ocr")[1] == f"What is the time?\n{SHORT}"
  assert questions(root, "textvqa", "lmms")[0] == f"What brand is it?\n{SHORT}"
  assert questions(root, "textvqa", "lmms_ocr")[0] == f"What brand is it?\n{ocr}\n{SHORT}"


def test_scienceqa_s_prompts(root: Path) -> None:
  told = questions(root, "scienceqa")
  assert told[1] == f"Context: N/A\nWhich 1?\n(A) ice (B) fire\n{LETTER}"
  assert questions(root, "scienceqa", "lmms") == [
    f"Which 1?\nA. ice\nB. fire\nC. air\n{LETTER}",
    f"Context: It is cold.\nWhich 3?\nA. ice\nB. fire\nC. air\n{LETTER}",
    f"Which 5?\nA. ice\nB. fire\nC. air\n{LETTER}",
  ]
  images = [item.images for item in TASKS["scienceqa"](root).items()]
  assert images[:2] == [(), (root / "scienceqa/images/test/1/image.png",)]


def test_mmbench_s_prompts(root: Path) -> None:
  assert questions(root, "mmbench") == [
    f'a hint\nwhat is "it"?\nA. cat\nB. dog\nC. cow\n{LETTER}',
    f"which\tone?\nA. red\nB. blue\n{LETTER}",  # the option "None" is an empty cell to pandas
    f"how\nmany?\nA. 1\nB. 2\nC. 3\nD. 4\n{LETTER}",
  ]
  chinese = questions(root, "mmbench_cn")[1]
  assert chinese == "which\tone?\nA. red\nB. blue\n请直接回答选项字母。"
  begin = 'a hint what is "it"? There are several options:\nA. cat\nB. dog\nC. cow\n\n'
  assert questions(root, "mmbench", "lmms")[0] == begin + LETTER
  lmms = questions(root, "mmbench_cn", "lmms")[1]
  assert lmms.startswith("which\tone? 有如下几个选项：\nA. red\nB. blue\n\n请直接使用")


def test_vizwiz_and_mme_and_mmvet_as_lmms_eval_asks(root: Path) -> None:
  first = questions(root, "vizwiz", "lmms")[0]
  assert first.startswith("What is this?\nWhen the provided information is insufficient, respond")
  assert questions(root, "vizwiz")[0].startswith("what IS this?\nWhen")
  assert questions(root, "mme", "lmms")[0] == f"Is a one?\n{SHORT}"
  assert questions(root, "mmvet", "lmms")[0].endswith("following question: \n\nWhat is x?")


# --- rules of single benchmarks ---


def test_gqa_s_figures(root: Path) -> None:
  task = TASKS["gqa"](root)
  items = task.items()
  given = dict(zip((i.id for i in items), ("Red..", "No", "left"), strict=True))
  scores = task.score(items, {k: Prediction(k, t) for k, t in given.items()})
  assert scores.headline == 2 / 3
  assert scores.figures["open"] == 1.0
  assert scores.figures["binary"] == 0.5
  assert scores.figures["semantic obj"] == 0.0
  lmms = TASKS["gqa"](root, protocol="lmms")
  assert task.verdict(items[0], "r.ed")["score"] == 0
  assert task.verdict(items[0], ".red")["score"] == 0
  assert lmms.verdict(items[0], "R.ed")["score"] == 1


def test_pope_s_two_readings(root: Path) -> None:
  llava, lmms = TASKS["pope"](root), TASKS["pope"](root, protocol="lmms")
  items = llava.items()
  loose = answers(items, lambda i: "Yes, it is" if i.truth == "yes" else "there is no cat")
  assert llava.score(items, loose).headline == 1.0
  assert lmms.score(items, loose).headline == 0.0
  assert lmms.score(items, loose).by_kind["all"]["yes_ratio"] == 0.5  # of the truths, as there
  never = llava.score(items, answers(items, "no"))  # ZeroDivisionError in the original
  assert never.headline == 0.0
  assert never.by_kind["random"]["precision"] == 0.0


def test_a_headline_over_some_parts_says_so(root: Path) -> None:
  for name, count, whole, part in (
    ("pope", 4, "mean F1 of the splits", "mean F1 of 1 of 3 splits"),
    ("mme", 4, "perception score (of 400)", "perception score (of 200)"),
  ):
    task = TASKS[name](root)
    items = task.items()
    given = answers(items, RIGHT[name])
    assert task.score(items, given).metric == whole
    assert task.score(items[:count], given).metric == part


def test_mme_needs_both_of_a_pair(root: Path, tmp_path: Path) -> None:
  task = TASKS["mme"](root)
  items = task.items()
  given = answers(items, lambda i: "Yes\tcertainly\nso")
  scores = task.score(items, given)
  assert scores.by_kind["count"]["accuracy"] == 0.5
  assert scores.by_kind["count"]["accuracy_plus"] == 0.0
  files = {f.name: f.read_text() for f in task.submission(items, given, tmp_path)}
  assert set(files) == {"artwork.txt", "count.txt", "code_reasoning.txt"}
  lines = files["artwork.txt"].splitlines()
  assert lines[0] == "a.txt\tIs a one? Please answer yes or no.\tYes\tYes certainly so"
  assert lines[1].split("\t")[1] == "Is a two?  Please answer yes or no."  # as in the release
  assert len(lines) == 4


def test_vqav2_lists_all_of_test2015_but_lmms_only_the_asked(root: Path, tmp_path: Path) -> None:
  llava, lmms = TASKS["vqav2"](root), TASKS["vqav2"](root, protocol="lmms")
  given = answers(llava.items(), "The Two")
  (file,) = llava.submission(llava.items(), given, tmp_path)
  assert [row["answer"] for row in json.loads(file.read_text())] == ["", "2", "2", "2", ""]
  (file,) = lmms.submission(lmms.items(), given, tmp_path)
  assert [row["question_id"] for row in json.loads(file.read_text())] == [1, 2, 3]


def test_seed_s_splits(root: Path, tmp_path: Path) -> None:
  items = TASKS["seed"](root, split="all").items()
  assert len(items) == 5
  assert len(TASKS["seed"](root).items()) == 4
  given = answers(items, "A")
  names = [
    file.name
    for split in ("image", "all")
    for file in TASKS["seed"](root, split=split).submission(items, given, tmp_path)
  ]
  assert names == ["seed_answers_image.jsonl", "seed_answers.jsonl"]
  task, lmms = TASKS["seed"](root), TASKS["seed"](root, protocol="lmms")
  assert task.verdict(items[0], "A.")["score"] == 0
  assert lmms.verdict(items[0], " A.")["score"] == 1
  scores = task.score(task.items(), answers(task.items(), "A"))  # the original: KeyError here
  assert scores.by_kind["Instance Identity"]["accuracy"] == 0.0
