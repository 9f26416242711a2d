"""Files of benchmarks: where they are found, what is said when they are damaged, what is handed in."""

from __future__ import annotations

from pathlib import Path

import pytest

from llava_sp_jax.tasks.catalog import BENCHMARKS, TASKS
from llava_sp_jax.tasks.files import BenchmarkError
from llava_sp_jax.tasks.task import Prediction
from tests.tasks import formats
from tests.tasks.formats import answers, damage

NAMES = [task.name for task in BENCHMARKS]


@pytest.mark.parametrize("name", ["gqa", "vizwiz", "mme", "seed", "llava_bench", "mmvet"])
def test_a_submission_has_a_place_for_every_question(root: Path, name: str, tmp_path: Path) -> None:
  """Official scorers pair lines by their place, or look every question up."""
  task = TASKS[name](root)
  items = task.items()
  given = answers(items, lambda item: f"word {item.id}")
  whole = [file.read_text() for file in task.submission(items, given, tmp_path)]
  del given[items[0].id]
  given[items[-1].id] = Prediction(items[-1].id, "unsaid", error="no such file")
  gaps = [file.read_text() for file in task.submission(items, given, tmp_path)]
  for before, after in zip(whole, gaps, strict=True):
    emptied = before
    for item in (items[0], items[-1]):
      emptied = emptied.replace(f"word {item.id}\n", "\n").replace(f'"word {item.id}"', '""')
    assert after == emptied
  assert gaps != whole


@pytest.mark.parametrize("name", NAMES)
def test_all_missing_files_are_told_at_once(name: str, tmp_path: Path) -> None:
  task = TASKS[name]
  with pytest.raises(FileNotFoundError) as caught:
    task(tmp_path)
  expected = list(task.needed) or [f"{task.split}.tsv"]
  for file in expected:
    assert str(tmp_path / file) in str(caught.value)
  assert "docs/Evaluation.md" in str(caught.value)


def test_the_folder_itself_works_as_well(root: Path) -> None:
  assert TASKS["gqa"](root / "gqa").items() == TASKS["gqa"](root).items()


def moved(root: Path, places: dict[str, str]) -> None:
  """Files as other people put them: {from: to}."""
  for old, new in places.items():
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    (root / old).rename(root / new)


@pytest.mark.parametrize(
  ("name", "given", "places"),
  [
    # LLaVA's docs/Evaluation.md names the folder of English MMBench.
    ("mmbench_cn", "", {"mmbench_cn/mmbench_dev_cn_20231003.tsv":
                        "mmbench/mmbench_dev_cn_20231003.tsv"}),
    ("mmvet", "", {"mm-vet": "mmvet"}),
    # mm-vet.zip holds a folder of its own, extracted beside LLaVA's questions or where the page says
    ("mmvet", "", {"mm-vet/mm-vet.json": "mm-vet/mm-vet/mm-vet.json",
                   "mm-vet/images": "mm-vet/mm-vet/images"}),
    ("mmvet", "mm-vet", {"mm-vet/mm-vet.json": "mm-vet/mm-vet/mm-vet.json",
                         "mm-vet/images": "mm-vet/mm-vet/images"}),
    ("mmvet", "", {"mm-vet/mm-vet.json": "mmvet/mm-vet.json", "mm-vet/images": "mmvet/images"}),
    ("mmvet", "mm-vet", {"mm-vet/mm-vet.json": "mmvet/mm-vet/mm-vet.json",
                         "mm-vet/images": "mmvet/mm-vet/images"}),
  ],
)  # fmt: skip
def test_files_are_found_where_llava_s_page_puts_them(
  own: Path, name: str, given: str, places: dict[str, str]
) -> None:
  (own / "mm-vet/images").mkdir()
  for i in range(3):
    (own / f"mm-vet/images/v1_{i}.png").write_bytes(formats.picture(i))
  expected = [(item.id, item.question, item.truth) for item in TASKS[name](own).items()]
  moved(own, places)
  items = TASKS[name](own / given).items()
  assert [(item.id, item.question, item.truth) for item in items] == expected
  assert all(isinstance(image, bytes) or image.is_file() for i in items for image in i.images)


DAMAGE = [
  ("vqav2", "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", '"image"', '"picture"',
   "line 1: without image"),
  ("vqav2", "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", '"question_id": 2', '"question_id": 1',
   "1 ids appear more than once, 1"),
  ("vizwiz", "vizwiz/llava_test.jsonl", "{", "", "line 1: not JSON"),
  ("scienceqa", "scienceqa/pid_splits.json", '"5"', '"6"', "2 questions .* 5, 6"),
  ("scienceqa", "scienceqa/llava_test_CQM-A.json", '"value"', '"text"',
   "expected conversations that begin with a value; 0"),
  ("pope", "pope/coco/coco_pope_random.json", "COCO_2.jpg", "COCO_9.jpg",
   "question 3 is of COCO_9.jpg, expected COCO_2.jpg"),
  ("pope", "pope/llava_pope_test.jsonl", '"category": "random"', '"category": "popular"',
   "4 labels for 5 questions"),
  ("mmbench", "mmbench/mmbench_dev_20230712.tsv", "hint", "help", "no column hint"),
  ("mmbench", "mmbench/mmbench_dev_20230712.tsv", "\tdev", "", "row 1: fewer fields"),
  ("vizwiz", "vizwiz/llava_test.jsonl", '"image": "VizWiz_test_0.jpg"', '"image": 7',
   "line 1: image 7, expected a text"),
  ("vizwiz", "vizwiz/llava_test.jsonl", '"question_id": 0', '"question_id": [0]',
   r"line 1: question_id \[0\], expected a text or a whole number"),
  ("gqa", "gqa/llava_gqa_testdev_balanced.jsonl", '"text": "Which?', '"category": {}, "text": "Which?',
   "line 1: category {}, expected a text"),
  ("scienceqa", "scienceqa/pid_splits.json", '"test": [', '"tests": [', "a list of questions under te"),
  ("textvqa", "textvqa/TextVQA_0.5.1_val.json", '"data"', '"rows"', "a list of annotations under data"),
  ("seed", "seed_bench/SEED-Bench.json", '"question_type": {', '"types": {', "expected a list of quest"),
  ("gqa", "gqa/data/testdev_balanced_questions.json", "{", "[" * 9999 + "{", "nested too deeply"),
  ("seed", "seed_bench/llava-seed-bench.jsonl", '"question_id": 2', '"question_id": 7',
   "without 1 questions of SEED-Bench.json: 2"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "old", "new", "message"), DAMAGE)
def test_damaged_files_are_told_with_their_place(
  own: Path, name: str, file: str, old: str, new: str, message: str
) -> None:
  damage(own / file, old, new)
  with pytest.raises(BenchmarkError, match=message) as caught:
    TASKS[name](own).items()
  assert str(own / Path(file).parts[0]) in str(caught.value)


@pytest.mark.parametrize(
  ("name", "file"),
  [
    ("vizwiz", "vizwiz/llava_test.jsonl"), ("scienceqa", "scienceqa/problems.json"),
    ("mmbench", "mmbench/mmbench_dev_20230712.tsv"),
  ],
)  # fmt: skip
def test_files_that_are_no_utf_8_are_named(own: Path, name: str, file: str) -> None:
  (own / file).write_bytes((own / file).read_bytes() + b"\xff\xfe")
  with pytest.raises(BenchmarkError, match=r"UTF-8 text.*fetch the file again") as caught:
    TASKS[name](own).items()
  assert str(own / file) in str(caught.value)


@pytest.mark.parametrize(("name", "file", "old", "new"), [d[:4] for d in DAMAGE[:1] + DAMAGE[3:4]])
def test_the_hash_follows_questions_and_truths(
  own: Path, name: str, file: str, old: str, new: str
) -> None:
  before = TASKS[name](own).data_hash()
  damage(own / file, old, new)
  assert TASKS[name](own).data_hash() != before


def test_many_broken_lines_make_one_error(own: Path) -> None:
  (own / "vizwiz/llava_test.jsonl").write_text("{}\n" * 9)
  with pytest.raises(BenchmarkError, match=r"line 5: .* and 4 more"):
    TASKS["vizwiz"](own).items()
