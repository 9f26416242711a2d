"""Files of benchmarks as people have them: odd rows, other line ends, pipes in place of files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.config import ConfigError
from llava_sp_jax.eval import run
from llava_sp_jax.files import FormatError
from llava_sp_jax.tasks import files
from llava_sp_jax.tasks.catalog import TASKS
from llava_sp_jax.tasks.easy_vqa import EasyVqa
from llava_sp_jax.tasks.files import BenchmarkError
from llava_sp_jax.tasks.mmbench import MmBench
from llava_sp_jax.tasks.task import EvalError, Item, Prediction, mean_by_kind
from tests.eval.scripted import Scripted
from tests.tasks.formats import RIGHT, answers, damage, picture

ROW = {"id": "0-0", "question": "what shape?", "image": "0.png", "answer": "circle"}


def easy_vqa(folder: Path, rows: Any) -> EasyVqa:
  (folder / "test.json").write_text(json.dumps(rows))
  return EasyVqa(folder)


@pytest.mark.parametrize(
  "answer", [None, 1, True, float("nan"), [], ["circle"], {"a": 1}, "", " ", " circle", "circle\n"]
)
def test_easy_vqa_leaves_out_a_truth_that_no_answer_can_equal(tmp_path: Path, answer: Any) -> None:
  task = easy_vqa(tmp_path, [ROW, {**ROW, "id": 7, "answer": answer}])
  good, odd = task.items()
  assert (good.kind, good.truth, good.problem) == ("shape", "circle", "")
  assert (odd.id, odd.kind) == ("7", "unknown")
  assert odd.problem == f"expected an answer without outer blanks, found {answer!r}"
  scores = run.run(task, Scripted(texts=["circle"]), tmp_path / "out")
  assert (scores.headline, scores.by_kind["all"]["items"]) == (1.0, 1)
  assert [row.id for row in scores.left_out] == ["7"]


def test_easy_vqa_without_the_key_is_left_out_too(tmp_path: Path) -> None:
  bare = {key: value for key, value in ROW.items() if key != "answer"} | {"id": "1"}
  assert [item.truth for item in easy_vqa(tmp_path, [ROW, bare]).items()] == ["circle", None]


@pytest.mark.parametrize(
  ("rows", "said"),
  [
    ([], r"empty; expected entries with id, question, image"),
    ({}, "expected a JSON list, found dict"),
    ([ROW, 3], r"\[1\]: no object"),
    ([ROW, {"id": "1"}], r"\[1\]: without question, image"),
    ([{**ROW, "question": 7}], r"\[0\]: question 7, expected a text"),
    ([{**ROW, "id": True}], r"\[0\]: id True, expected a text or a whole number"),
    ([ROW, ROW], "1 ids appear more than once, 0-0"),
    ([{**ROW, "answer": None}], "expected questions that can be scored; 0-0: expected an answer"),
  ],
)
def test_easy_vqa_refuses_what_cannot_be_asked(tmp_path: Path, rows: Any, said: str) -> None:
  with pytest.raises(BenchmarkError, match=said):
    easy_vqa(tmp_path, rows).items()


@pytest.mark.parametrize("name", ["gqa", "pope", "textvqa", "seed", "mmvet", "mmbench", "mme"])
def test_a_mark_in_front_and_other_line_ends_change_nothing(own: Path, name: str) -> None:
  """As editors of Windows save them. A cell of MMBench may hold line ends of its own."""
  task = TASKS[name](own)
  before, whole = task.items(), task.score(task.items(), answers(task.items(), RIGHT[name]))
  folder = task.folder
  for path in [p for p in folder.rglob("*") if p.suffix in (".json", ".jsonl", ".tsv", ".txt")]:
    data = path.read_bytes()
    ends = data if path.suffix == ".tsv" else data.replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + ends)
  again = TASKS[name](own)
  assert again.items() == before
  assert again.score(before, answers(before, RIGHT[name])).headline == whole.headline


@pytest.mark.parametrize(
  ("name", "file"),
  [
    ("pope", "pope/coco/coco_pope_random.json"),
    ("gqa", "gqa/data/testdev_balanced_questions.json"),
    ("mmbench", "mmbench/mmbench_dev_20230712.tsv"),
    ("vizwiz", "vizwiz/llava_test.jsonl"),
    ("vqav2", "vqav2/llava_vqav2_mscoco_test2015.jsonl"),
  ],
)
def test_a_pipe_in_place_of_a_file_is_named(own: Path, name: str, file: str) -> None:
  """Nothing waits for it."""
  (own / file).unlink()
  os.mkfifo(own / file)
  with pytest.raises(FormatError, match=r"expected a regular file, found a pipe"):
    [TASKS[name](own).items(), TASKS[name](own).data_hash()]


@pytest.mark.parametrize("odd", ["\\u0000", "\\ud800", "\\u001b[2J"])
def test_a_name_of_mme_that_names_no_file_is_refused(own: Path, odd: str) -> None:
  """The submission's files are named by it."""
  damage(own / "MME/llava_mme.jsonl", '"question_id": "count/b.png"', f'"question_id": "{odd}"')
  with pytest.raises(BenchmarkError, match=r"expected question_id such as .*; question_id '\\"):
    TASKS["mme"](own).items()


def test_a_text_of_mme_that_is_none_is_named_with_its_pair(own: Path) -> None:
  path = own / "MME/MME_Benchmark_release_version/count/b.txt"
  path.write_bytes(path.read_bytes() + b"\xff\xfe")
  bad = {item.id: item.problem for item in TASKS["mme"](own).items() if item.problem}
  assert set(bad) == {"count/b.png#1", "count/b.png#2"}
  assert all("b.txt: not UTF-8 text" in problem for problem in bad.values())


@pytest.mark.parametrize("more", [1, -1])
def test_an_image_of_mme_without_a_pair_is_left_out(own: Path, more: int) -> None:
  """Three right answers, or one, would never count as a pair, and so cost points in silence."""
  asked, told = own / "MME/llava_mme.jsonl", own / "MME/MME_Benchmark_release_version/count/b.txt"
  lines = asked.read_text().splitlines()
  mine = [line for line in lines if "count/b.png" in line]
  if more > 0:
    damage(told, "Is b one?", "Is b red? Please answer yes or no.\tYes\nIs b one?")
    lines.append(mine[0].replace("one", "red"))
  else:
    lines.remove(mine[0])
  asked.write_text("\n".join(lines))
  task = TASKS["mme"](own)
  items = task.items()
  assert [i.problem for i in items if i.extra["pair"] == "count/b.png"] == [
    f"{2 + more} questions about this image; expected a pair"
  ] * (2 + more)
  scores = task.score(items, answers(items, RIGHT["mme"]))
  assert scores.by_kind["count"]["score"] == 200


def test_an_index_of_mmbench_that_is_none_is_named(own: Path) -> None:
  """Others write `1-2` or `3.0` there; the orders of one question cannot be told from it."""
  path = own / "mmbench/mmbench_dev_20230712.tsv"
  for index in ("1-2", "5.0", "", "²", "9" * 40):
    damage(path, "\n5\t", f"\n{index}\t")
    task = MmBench(own, "lmms")
    items = task.items()
    assert [item.id for item in items] == ["3", index or "row 2", "9"]
    assert [item.problem[:10] for item in items] == ["", "the index ", ""]
    scores = task.score(items, answers(items, RIGHT["mmbench"]))
    assert (scores.headline, scores.by_kind["all"]["items"]) == (1.0, 2)
    damage(path, f"\n{index}\t", "\n5\t")


def test_an_image_of_mmbench_may_stand_in_another_row(own: Path) -> None:
  """Also in two steps; a row that is not there, or a circle, is an image that cannot be read."""
  path = own / "mmbench/mmbench_dev_20230712.tsv"
  text = path.read_text()
  whole = {item.id: item.images[0] for item in MmBench(own).items()}
  image = text.split("\n3\t")[1].split("\t")[8]
  cells: list[tuple[str, str, bytes]] = [
    ("3", "5", picture(9)),
    ("77", image, b""),
    ("5", "9", b""),
    ("iVBOR", image, b""),
    ("not base64!", image, b""),
    ("", image, b""),
  ]
  assert set(whole.values()) == {picture(9)}
  for last, middle, expected in cells:
    changed = text.replace("counts\t3\t", f"counts\t{last}\t")
    if middle != image:
      changed = changed.replace(f"colours\t{image}", f"colours\t{middle}")
    path.write_text(changed)
    if middle == "5":  # 9 -> 3, 5 -> 5
      continue
    assert MmBench(own).items()[2].images == (expected,)
  path.write_text(
    text.replace("counts\t3\t", "counts\t5\t").replace(f"colours\t{image}", "colours\t3")
  )
  assert MmBench(own).items()[2].images == (picture(9),)


def test_ids_may_be_numbers_in_one_file_and_texts_in_another(own: Path) -> None:
  """As a library that guesses types writes them; MMBench's are numbers by themselves."""
  before = TASKS["scienceqa"](own).items()
  damage(own / "scienceqa/pid_splits.json", '"5"', "5")
  damage(own / "scienceqa/llava_test_CQM-A.json", '"id": "3"', '"id": 3')
  assert TASKS["scienceqa"](own).items() == before
  wild = TASKS["llava_bench"](own).items()
  damage(
    own / "llava-bench-in-the-wild/answers_gpt4.jsonl", '"question_id": 2', '"question_id": "2"'
  )
  assert TASKS["llava_bench"](own).items() == wild
  text = TASKS["textvqa"](own).items()
  for file in ("TextVQA_0.5.1_val.json", "llava_textvqa_val_v051_ocr.jsonl"):
    path = own / "textvqa" / file
    path.write_text(path.read_text().replace('"im0"', "17" if "val.json" in file else '"17"'))
  assert [item.truth for item in TASKS["textvqa"](own).items()] == [item.truth for item in text]


def test_a_kind_that_is_called_all_counts_once() -> None:
  items = [Item("1", "q", (), "all", "x"), Item("2", "q", (), "other", "x")]
  told = {i.id: Prediction(i.id, t) for i, t in zip(items, "xy", strict=True)}

  def verdict(item: Item, text: str) -> dict[str, Any]:
    return {"score": float(text == item.truth)}

  found = mean_by_kind(items, told, verdict)
  assert found["all"] == {"accuracy": 0.5, "items": 2, "asked": 2}


def test_nothing_that_was_scored_is_no_result(tiny_data: Path, tmp_path: Path) -> None:
  """0.00% would be one."""
  lost = {f"{i}.png": "no such file" for i in range(99)}
  scores = run.run(EasyVqa(tiny_data), Scripted(fails=lost), tmp_path / "out")
  assert scores.headline is None
  assert scores.metric == "no score: none of 12 questions has an answer that can be scored"
  assert "no score: none of 12 questions" in (tmp_path / "out/index.html").read_text()


@pytest.mark.parametrize("ids", [["a", "a"], [1, 2]])
def test_a_task_of_one_s_own_needs_ids(tiny_data: Path, tmp_path: Path, ids: list[Any]) -> None:
  class Own(EasyVqa):
    def items(self) -> list[Item]:
      return [Item(key, "q", (), "k", "t") for key in ids]

  with pytest.raises(
    EvalError, match=r"easy_vqa: ids that are not texts, or appear more than once"
  ):
    run.run(Own(tiny_data), Scripted(), tmp_path / "out")


BROKEN: list[tuple[str, Callable[[Path], Any], type[Exception]]] = [
  ("a list", lambda path: files.read_json(path), BenchmarkError),
  ("lines", lambda path: files.read_lines(path, ("id",)), BenchmarkError),
]


@pytest.mark.parametrize(("what", "read", "kind"), BROKEN)
@pytest.mark.parametrize(
  "data", [b"", b"\0\0", b"[" * 99999, b"\xff\xfe{", b'{"a": ' + b"9" * 5000]
)
def test_what_is_no_json_is_one_line(
  tmp_path: Path, what: str, read: Callable[[Path], Any], kind: type[Exception], data: bytes
) -> None:
  path = tmp_path / "file"
  path.write_bytes(data)
  with pytest.raises(kind) as caught:
    read(path)
  assert str(path) in str(caught.value)
  assert "\n" not in str(caught.value)


def test_an_unknown_split_of_seed_is_told(root: Path) -> None:
  with pytest.raises(ConfigError, match="seed split: unknown 'Image'; known: all, image"):
    TASKS["seed"](root, split="Image")


@pytest.mark.parametrize("name", ["predictions.jsonl", "sessions.jsonl", "settings.json"])
def test_a_pipe_in_a_folder_of_results_is_named(tiny_data: Path, tmp_path: Path, name: str) -> None:
  """Neither opening it for writing nor reading it would ever end."""
  task, out = EasyVqa(tiny_data), tmp_path / "out"
  run.run(task, Scripted(), out)
  (out / name).unlink()
  os.mkfifo(out / name)
  said = rf"{name}: expected a regular file; move away what is there"
  with pytest.raises(EvalError, match=said):
    run.run(task, Scripted(), out)
  with pytest.raises(EvalError, match=said):
    run.finish(task, out)
