"""Every benchmark from its official files to scores and submissions; MMBench; judges."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from llava_sp_jax.config import ConfigError
from llava_sp_jax.eval import run
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.tasks.benchmark import Benchmark
from llava_sp_jax.tasks.catalog import BENCHMARKS, TASKS
from llava_sp_jax.tasks.judge import Ask
from llava_sp_jax.tasks.llava_bench import LlavaBench, pair
from llava_sp_jax.tasks.mmbench import MmBench
from llava_sp_jax.tasks.mmvet import MmVet, grade
from llava_sp_jax.tasks.task import EvalError, Prediction
from tests.tasks import formats
from tests.tasks.formats import RIGHT, answers, damage, right, right_letter

NAMES = [task.name for task in BENCHMARKS]
SERVED = {"vqav2", "vizwiz", "mmbench", "mmbench_cn", "llava_bench", "mmvet"}
# What LLaVA's scripts ask for: model_vqa_loader's 128 tokens, 1024 of the other three.
TOKENS = {
  "scienceqa": 1024,
  "mmbench": 1024,
  "mmbench_cn": 1024,
  "llava_bench": 1024,
  "mmvet": 1024,
}


def cases() -> list[tuple[str, str]]:
  return [(task.name, protocol) for task in BENCHMARKS for protocol in task.protocols]


def test_the_table_names_the_twelve() -> None:
  assert len(BENCHMARKS) == 12
  assert set(formats.WRITERS) == set(NAMES) == set(TASKS) - {"easy_vqa", "vqa_json"}


@pytest.mark.parametrize(("name", "protocol"), cases())
def test_from_files_to_scores(root: Path, name: str, protocol: str, tmp_path: Path) -> None:
  task = TASKS[name](root, protocol=protocol)
  items = task.items()
  assert len({item.id for item in items}) == len(items) > 1
  assert task.protocol.startswith(f"{protocol}: ")
  assert task.generation.num_beams == 1
  assert task.generation.temperature == 0
  for item in items:
    json.dumps([item.truth, item.extra])
    assert item.question.strip() == item.question or name == "mmvet"
    assert "<image>" not in item.question
  given = answers(items, RIGHT[name])
  scores = task.score(items, given)
  json.dumps(dataclasses.asdict(scores))
  assert (
    scores.by_kind["all"]["items"]
    == scores.by_kind["all"]["asked"]
    == (len(items) if name != "pope" else 12)
  )
  served = name in SERVED and not (name.startswith("mmbench") and protocol == "lmms")
  if served:
    assert scores.headline is None
  else:
    best = {"mme": 400.0, "textvqa": 1.0}.get(name, 1.0)
    assert scores.headline == best
    wrong = task.score(items, answers(items, "nothing of the kind"))
    assert (wrong.headline or 0) < best
  if not served or name.startswith("mmbench"):
    assert {task.verdict(i, given[i.id].text).get("score") for i in items} == {1.0}
  if name.startswith("mmbench"):
    pytest.importorskip("openpyxl", reason="the extra xlsx is not installed")
  for file in task.submission(items, given, tmp_path / "out"):
    assert file.is_file()
  assert task.data_hash() == TASKS[name](root, protocol=protocol).data_hash()


@pytest.mark.parametrize("name", NAMES)
def test_llava_s_generation(root: Path, name: str) -> None:
  assert TASKS[name](root).generation == Generation(max_new_tokens=TOKENS.get(name, 128))


@pytest.mark.parametrize(("name", "protocol"), cases())
def test_missing_answers_are_counted_and_never_right(
  root: Path, name: str, protocol: str, tmp_path: Path
) -> None:
  task = TASKS[name](root, protocol=protocol)
  items = task.items()
  given = answers(items, RIGHT[name])
  del given[items[0].id]
  given[items[-1].id] = dataclasses.replace(given[items[-1].id], error="no such file")
  scores = task.score(items, given)
  total = scores.by_kind["all"]
  assert total["asked"] == len(items)
  wrong_if_missing = name in ("seed", "scienceqa") and protocol == "llava"
  assert total["items"] == len(items) - (0 if wrong_if_missing else 2)
  if wrong_if_missing:
    assert total["accuracy"] == (len(items) - 2) / len(items)
  nothing = task.score(items, {})
  assert not nothing.headline
  assert all(row.get("accuracy", 0.0) == 0.0 for row in nothing.by_kind.values())
  if not name.startswith("mmbench"):
    for file in task.submission(items, given, tmp_path / "out"):
      assert (
        items[-1].truth is None or f"{items[-1].id}: {right(items[-1])}" not in file.read_text()
      )


def test_an_unknown_protocol_is_refused_with_the_known_ones(root: Path) -> None:
  with pytest.raises(ConfigError, match="pope protocol: unknown 'lmm'; known: llava, lmms"):
    TASKS["pope"](root, protocol="lmm")


# --- MMBench ---


def test_mmbench_reads_its_images(root: Path) -> None:
  items = MmBench(root).items()
  for item in items:  # the third's field is the index of the first
    (data,) = item.images
    assert isinstance(data, bytes)
    assert Image.open(io.BytesIO(data)).size == (8, 8)
  assert items[2].images == items[0].images


def test_an_image_that_is_no_base64_is_left_to_the_engine(own: Path) -> None:
  damage(own / "mmbench/mmbench_dev_20230712.tsv", "\tiVBOR", "\t!BOR")
  assert MmBench(own).items()[0].images == (b"",)


def test_circular_asks_each_order_once_and_wants_all_right(root: Path) -> None:
  task = MmBench(root, "lmms", circular=True)
  items = task.items()
  assert len(items) == 3 + 2 + 4
  for item in items:
    texts = {"3": "dog", "5": "red", "9": "4"}
    assert item.extra["options"][item.truth] == texts[item.id.split("/")[0]]
  assert [i.truth for i in items[:3]] == ["B", "A", "C"]
  given = answers(items, right_letter)
  assert task.score(items, given).headline == 1.0
  given["9/2"] = Prediction("9/2", "A" if items[-2].truth != "A" else "B")
  scores = task.score(items, given)
  assert scores.headline == 2 / 3
  assert scores.by_kind["counts"] == {"accuracy": 0.0, "items": 1, "asked": 1}
  del given["5/1"]
  scores = task.score(items, given)
  assert scores.by_kind["all"] == {"accuracy": 1 / 2, "items": 2, "asked": 3}
  assert scores.figures["unanswered"] == 1
  always = task.score(items, answers(items, "B"))  # a letter that is always said wins nothing
  assert always.headline == 0.0


def test_rows_of_a_circular_file_belong_together(own: Path) -> None:
  """The official files with circular rows have them under index + 1,000,000 x n."""
  path = own / "mmbench/mmbench_dev_20230712.tsv"
  rows = list(csv.reader(path.read_text().splitlines(keepends=True), delimiter="\t"))
  rows.append(["1000005", "which one?", "", "blue", "red", "", "", "B", *rows[2][8:]])
  with path.open("w", newline="") as file:
    csv.writer(file, delimiter="\t").writerows(rows)
  task = MmBench(own, "lmms")
  items = task.items()
  scores = task.score(items, answers(items, "A"))
  assert scores.by_kind["colours"] == {"accuracy": 0.0, "items": 1, "asked": 1}
  assert scores.by_kind["all"]["asked"] == 3


def test_llava_s_protocol_leaves_mmbench_to_the_server(root: Path) -> None:
  task = MmBench(root)
  scores = task.score(task.items(), answers(task.items(), right_letter))
  assert scores.headline is None
  assert scores.figures["local"]["all"]["accuracy"] == 1.0


@pytest.mark.parametrize("protocol", ["llava", "lmms"])
@pytest.mark.parametrize("hidden", ["", "nan", "no column"])
def test_a_split_without_answers_has_no_truth_and_no_score(
  own: Path, protocol: str, hidden: str
) -> None:
  path = own / "mmbench/mmbench_dev_20230712.tsv"
  with path.open(newline="") as file:
    rows = list(csv.reader(file, delimiter="\t"))
  place = rows[0].index("answer")
  for row in rows[1:]:
    row[place] = hidden
  if hidden == "no column":
    rows = [[*row[:place], *row[place + 1 :]] for row in rows]
  with path.open("w", newline="") as file:
    csv.writer(file, delimiter="\t").writerows(rows)
  task = MmBench(own, protocol, circular=True)
  items = task.items()
  assert {item.truth for item in items} == {None}
  assert {"score" in task.verdict(item, "A") for item in items} == {False}
  scores = task.score(items, answers(items, "A"))
  assert scores.headline is None
  assert scores.figures == {}


def test_the_sheet_keeps_texts_as_texts(root: Path, tmp_path: Path) -> None:
  openpyxl = pytest.importorskip("openpyxl", reason="the extra xlsx is not installed")
  task = MmBench(root, circular=True)
  items = task.items()
  given = answers(items, "=B\x00 1")
  given.pop("5")
  (file,) = task.submission(items, given, tmp_path)
  assert file.name == "mmbench_dev_20230712.xlsx"
  page = openpyxl.load_workbook(file).active
  assert page["G2"].data_type == "s"  # "f" would be a formula
  header, *rows = page.iter_rows(values_only=True)
  assert header == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
  assert rows[0] == (3, 'what is "it"?', "cat", "dog", "cow", None, "=B 1", "B", "dev")
  assert rows[1][4:7] == (None, None, None)
  assert len(rows) == 3


def test_without_openpyxl_it_says_what_to_install(
  root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setitem(sys.modules, "openpyxl", None)
  task = MmBench(root)
  with pytest.raises(ModuleNotFoundError, match=r"pip install llava-sp-jax\[xlsx\]"):
    task.submission(task.items(), {}, tmp_path)
  with pytest.raises(EvalError, match=r"20230712.xlsx: .*pip install llava-sp-jax\[xlsx\]"):
    run.check(task)
  for other in (TASKS["pope"](root), TASKS["seed"](root)):
    run.check(other)


# --- judges ---


class Scripted:
  """A judge whose answers are a function of the asking; it remembers them."""

  name = "scripted"

  def __init__(self, answer: Callable[[Ask], str]):
    self.answer, self.asked = answer, list[Ask]()

  def __call__(self, ask: Ask) -> str:
    self.asked.append(ask)
    return self.answer(ask)


def failing(ask: Ask) -> str:
  raise OSError("down")


def test_mmbench_s_judge_reads_what_no_rule_can(root: Path) -> None:
  judge = Scripted(lambda ask: "E" if "an odd one" in ask.prompt else "B")
  task = MmBench(root, "lmms", judge=judge)
  items = task.items()
  texts = {"3": "the barking pet", "5": "an odd one", "9": "D"}
  given = {k: Prediction(k, t) for k, t in texts.items()}
  assert task.verdict(items[0], texts["3"]) == {"read": ""}
  scores = task.score(items, given)
  assert scores.headline == 2 / 3
  assert len(judge.asked) == 2  # the third needed none
  assert 'Question: what is "it"??\nOptions: There are several options: \nA. cat' in (
    judge.asked[0].prompt
  )
  assert [r["text"] for r in scores.figures["reviews"]] == ["B", "E"]
  for bad in (Scripted(failing), Scripted(lambda ask: "I cannot tell")):
    task = MmBench(root, "lmms", judge=bad)
    scores = task.score(items, given)
    assert scores.by_kind["all"] == {"accuracy": 1.0, "items": 1, "asked": 3}
    assert scores.figures["unjudged"] == 2
    assert len(bad.asked) == 6
    nothing = task.score(items[:2], {k: given[k] for k in ("3", "5")})
    assert nothing.headline is None
    assert nothing.metric == "no score: the judge failed for all of 2 answers"
  alone = MmBench(root, "lmms")
  assert alone.score(items, given).headline == 1 / 3
  assert alone.protocol.endswith("no judge")


def test_llava_bench_compares_means(root: Path, tmp_path: Path) -> None:
  said = {"0": "8 6\nwell", "1": "10, 5", "2": "9 9", "3": "7 8\n"}

  def answer(ask: Ask) -> str:
    number = next(k for k in said if f"What {k}?" in ask.prompt)
    return said[number]

  judge = Scripted(answer)
  task = LlavaBench(root, judge=judge, reviews=tmp_path / "reviews.jsonl")
  items = task.items()
  scores = task.score(items, answers(items, "mine"))
  # "10, 5" has two blanks between its numbers once the comma is one, and is refused by the original
  assert scores.figures["unjudged"] == 1
  assert scores.by_kind["all"] == {
    "score": round(round(23 / 3, 3) / 8.0 * 100, 1),
    "reference": 8.0,
    "model": round(23 / 3, 3),
    "items": 3,
    "asked": 4,
  }
  assert scores.by_kind["conv"]["score"] == round(7 / 7.5 * 100, 1)
  assert scores.by_kind["detail"]["items"] == 0
  assert scores.headline == scores.by_kind["all"]["score"]
  assert "judge scripted" in task.protocol
  ask = judge.asked[0]
  assert ask.temperature == 0.2
  assert ask.prompt.startswith(
    "[Context]\nA cat.\nOn a mat.\n\n[Question]\nWhat 0?\n\n[Assistant 1]\ntruth 0\n\n"
    "[End of Assistant 1]\n\n[Assistant 2]\nmine\n\n[End of Assistant 2]\n\n[System]\nWe would"
  )
  again = LlavaBench(root, judge=Scripted(failing), reviews=tmp_path / "reviews.jsonl")
  assert again.score(items, answers(items, "mine")).headline == scores.headline  # kept answers
  said["1"] = "10 5"  # the judge that was not understood is asked again, the others are not
  later = Scripted(answer)
  task = LlavaBench(root, judge=later, reviews=tmp_path / "reviews.jsonl")
  better = task.score(items, answers(items, "mine"))
  assert (better.figures["unjudged"], len(later.asked)) == (0, 1)
  assert task.score(items, answers(items, "mine")) == better
  assert len(later.asked) == 1
  down = LlavaBench(root, judge=Scripted(failing)).score(items, answers(items, "mine"))
  assert down.headline is None
  assert down.metric == "no score: the judge failed for all of 4 answers"
  assert down.figures["unjudged"] == 4
  assert down.figures["reviews"][0]["error"] == "OSError: down"


def test_mmvet_s_grades(root: Path) -> None:
  def answer(ask: Ask) -> str:
    if "Where?" in ask.prompt:
      return "perhaps"
    if "Who?" in ask.prompt and ask.turn == 0:
      return "Score: 1"
    return "0.5" if "What is x?" in ask.prompt else "1.0 yes"

  judge = Scripted(answer)
  task = MmVet(root, judge=judge)
  items = task.items()
  scores = task.score(items, answers(items, "x=-1"))
  assert scores.headline == 75.0
  assert scores.by_kind["all"] == {"score": 75.0, "items": 2, "asked": 3}
  assert scores.by_kind["math+ocr"]["score"] == 50.0
  assert scores.figures["capability rec"] == {"score": 100.0, "items": 1}
  assert scores.figures["unjudged"] == 1
  assert [(a.turn, a.temperature) for a in judge.asked] == [
    (0, 0),
    (0, 0),
    (1, 0),
    (0, 0),
    (1, 0),
    (2, 0.5),
    (3, 1.0),
    (4, 1.5),
  ]
  down = MmVet(root, judge=Scripted(failing)).score(items, answers(items, "x"))
  assert down.headline is None
  assert down.metric == "no score: the judge failed for all of 3 answers"
  assert task.score(items, {}).metric == "no score: there is no answer"
  assert down.figures["unjudged"] == 3


@pytest.mark.parametrize(
  ("protocol", "digest", "end", "again", "temperatures", "tokens"),
  [
    (
      "llava",
      "d1b3e0a5b4e72c88",
      "x=-1 | ",
      "\nPredict the correctness of the answer (digit): ",
      [0, 0, 0.5, 1.0, 1.5],
      3,
    ),
    ("lmms", "4d9b806e960fcd3f", "x=-1 |", "", [0, 0.5, 1.0, 1.5], 128),
  ],
)
def test_mmvet_s_graders_word_for_word(
  root: Path,
  protocol: str,
  digest: str,
  end: str,
  again: str,
  temperatures: list[float],
  tokens: int,
) -> None:
  """Hashes of `prompt` in MM-Vet's mm-vet_evaluator.py and of MM_VET_PROMPT in lmms-eval."""
  judge = Scripted(lambda ask: "no number")
  task = MmVet(root, protocol, judge=judge)
  item = task.items()[0]
  task.score([item], answers([item], "x=-1"))
  first, *later = judge.asked
  prompt, _, question = first.prompt.rpartition("\n")
  assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == digest
  assert question == f"What is x? | -1 <AND> -5 | {end}"
  assert {ask.prompt for ask in later} == {first.prompt + again}
  assert [ask.temperature for ask in judge.asked] == temperatures
  assert {ask.max_tokens for ask in judge.asked} == {tokens}


def test_a_judge_of_mmvet_needs_the_truths(own: Path) -> None:
  (own / "mm-vet/mm-vet.json").unlink()
  assert len(MmVet(own).items()) == 3
  with pytest.raises(FileNotFoundError, match=r"mm-vet.json; the judge compares with it"):
    MmVet(own, judge=failing)


@pytest.mark.parametrize(
  ("review", "scores"),
  [("8 7", (8.0, 7.0)), ("8,7\nx", (8.0, 7.0)), ("8 7 6", None), ("8", None), ("a b", None),
   ("", None), ("nan 7", None), ("8 inf\nx", None)],
)  # fmt: skip
def test_two_scores_in_the_first_line(review: str, scores: tuple[float, float] | None) -> None:
  assert pair(review) == scores


@pytest.mark.parametrize(
  ("review", "value"),
  [
    ("0.4", 0.4),
    ("1.0 right", 1.0),
    (" 1.0", None),
    ("1.1", None),
    ("-0.1", None),
    ("nan", None),
    ("x", None),
  ],
)
def test_a_grade_from_0_to_1(review: str, value: float | None) -> None:
  assert grade(review) == value


def test_options_are_what_the_constructors_take() -> None:
  import inspect

  for task in BENCHMARKS:
    assert issubclass(task, Benchmark)
    taken = list(inspect.signature(task).parameters)
    assert taken == ["folder", *task.options]
