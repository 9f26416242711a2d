"""The page: well-formed, of one file, with everything escaped, and with what the scores say."""

from __future__ import annotations

import base64
import dataclasses
import html.parser
import io
import re
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from llava_sp_jax.eval import run
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.results import compare, gallery, page, published, tables
from llava_sp_jax.results.scores import BenchmarkScores
from llava_sp_jax.tasks.catalog import BENCHMARKS, TASKS
from llava_sp_jax.tasks.task import EvalError, Item, Predictions, Scores, mean_by_kind
from tests.eval.scripted import Scripted
from tests.tasks import formats

EVIL = '<script>alert("x")</script>&amp; <img src=http://example.com/x.png> \x00 \ud800 \'"'
SIZE = 2_000_000  # bytes of the whole page
VOID = {"meta", "img", "br"}
SCORES = BenchmarkScores(
  task="", protocol="", variant={}, headline=None, metric="", figures={}, interval=None, data_hash="",
  by_kind={}, asked=9, answered=9, failures=(), left_out=(), engine={}, submission=(), questions=9,
)  # fmt: skip


class Reader(html.parser.HTMLParser):
  """Tags, texts and resources of a page; fails when tags do not match."""

  def __init__(self, text: str):
    super().__init__()
    self.open: list[str] = []
    self.tags: Counter[str] = Counter()
    self.classes: Counter[str] = Counter()
    self.resources: list[str] = []
    self.texts: list[str] = []
    self.feed(text)
    self.close()
    assert self.open == [], f"not closed: {self.open}"

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    self.tags[tag] += 1
    values = dict(attrs)
    self.classes.update((values.get("class") or "").split())
    self.resources += [
      v or "" for k, v in attrs if k in ("src", "href", "action", "data", "srcset")
    ]
    assert not any(k.startswith("on") for k in values), attrs
    if tag not in VOID:
      self.open.append(tag)

  def handle_endtag(self, tag: str) -> None:
    assert self.open.pop() == tag

  def handle_data(self, data: str) -> None:
    self.texts.append(data)


class Made:
  """A task whose questions, kinds and answers are what tests need; a third of its images is bytes."""

  name, protocol = "pope", "made for this test"
  generation = Generation(max_new_tokens=4)
  variant: ClassVar = {"protocol": "llava"}

  def __init__(self, folder: Path, count: int = 300, kind: str = "kind"):
    self.folder, self.count, self.kind = folder, count, kind
    for i in range(12):
      pixels = np.random.default_rng(i).integers(0, 256, (300, 200, 3), dtype=np.uint8)
      Image.fromarray(pixels).save(folder / f"{i}.png")

  def items(self) -> list[Item]:
    paths = [self.folder / f"{i}.png" for i in range(12)]
    pictures = [path if i % 3 else path.read_bytes() for i, path in enumerate(paths)]
    return [
      Item(f"id-{i}", f"{EVIL} {i}?", (pictures[i % 12],), f"{self.kind} {i % 3}", "yes")
      for i in range(self.count)
    ]

  def data_hash(self) -> str:
    return f"{self.count}"

  def verdict(self, item: Item, text: str) -> dict[str, Any]:
    return {"score": float(text == item.truth)}

  def score(self, items: list[Item], predictions: Predictions) -> Scores:
    rows = mean_by_kind(items, predictions, self.verdict)
    return Scores(rows["all"]["accuracy"], "accuracy", rows)

  def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
    return []


@pytest.fixture
def task(tmp_path: Path) -> Made:
  return Made(tmp_path, kind=EVIL)


@pytest.fixture
def scored(task: Made, tmp_path: Path) -> tuple[BenchmarkScores, Path]:
  out = tmp_path / "out"
  return run.run(task, Scripted(texts=["yes", EVIL, "no" * 900]), out), out


def test_the_page_stands_alone_and_says_what_the_scores_say(
  scored: tuple[BenchmarkScores, Path],
) -> None:
  scores, out = scored
  text = (out / page.FILE).read_text()
  assert len(text.encode()) < SIZE
  found = Reader(text)
  assert found.tags["script"] == found.tags["link"] == found.tags["iframe"] == 0
  assert all(uri.startswith("data:image/jpeg;base64,") for uri in found.resources)
  assert not re.search(r"url\(|@import", page.STYLE)
  everything = "".join(found.texts)
  assert EVIL.split("\x00")[0] in everything, "shown as it is, not run"
  assert tables.headline(scores) == "33.33% accuracy"
  assert "33.33% accuracy" in everything
  assert "Over 300 of 300 questions." in everything
  assert found.classes["wrong"] > found.classes["right"] > 0
  assert found.tags["rect"] == len(scores.by_kind) == 4
  assert "... (1800 characters)" in everything
  assert scores.data_hash in everything


def test_pictures_are_small_and_real(scored: tuple[BenchmarkScores, Path]) -> None:
  found = Reader((scored[1] / page.FILE).read_text())
  assert len(found.resources) == found.tags["img"] > 10
  for uri in found.resources:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
      assert picture.format == "JPEG"
      assert max(picture.size) == gallery.SIDE
      assert picture.width / picture.height == pytest.approx(200 / 300, rel=0.02)


def test_bars_are_as_long_as_the_figures(scored: tuple[BenchmarkScores, Path]) -> None:
  scores, out = scored
  text = (out / page.FILE).read_text()
  widths = [float(w) for w in re.findall(r'<rect[^>]*width="([\d.]+)"', text)]
  values = [row["accuracy"] for row in scores.by_kind.values()]
  assert widths == pytest.approx([v * page.BAR[0] for v in values], abs=0.06)
  points = dataclasses.replace(
    scores,
    metric="points",
    by_kind={
      "all": {"points": 700.0, "items": 3, "asked": 3},
      "b": {"points": 1400.0, "items": 3, "asked": 4},
    },
  )
  page.write(out, points, [], {})
  text = (out / page.FILE).read_text()
  assert re.findall(r'<rect[^>]*width="([\d.]+)"', text) == ["210.0", "420.0"]
  assert "1400.0 of 3" in text


def test_others_figures_are_marked_as_theirs(scored: tuple[BenchmarkScores, Path]) -> None:
  everything = "".join(Reader((scored[1] / page.FILE).read_text()).texts)
  assert "Published by others" in everything
  assert "were not measured here" in everything
  assert published.SOURCE in everything
  assert "86.4" in everything
  others: tuple[dict[str, Any], ...] = (
    {"task": "easy_vqa"},
    {"variant": {"protocol": "lmms"}},
    {"questions": 301},
    {"variant": {"protocol": "llava", "split": "image"}},
  )
  for change in others:
    page.write(scored[1], dataclasses.replace(scored[0], **change), [], {})
    assert "Published by others" not in (scored[1] / page.FILE).read_text()


def test_every_benchmark_has_its_published_figures(tmp_path: Path) -> None:
  """Each with LLaVA's own protocol, and of SEED for images and videos."""
  assert [name for name, *_ in published.FIGURES] == [task.name for task in BENCHMARKS]
  for name, write in formats.WRITERS.items():
    write(tmp_path)
    variant = TASKS[name](tmp_path, **({"split": "all"} if name == "seed" else {})).variant
    scores = dataclasses.replace(SCORES, task=name, variant=variant)
    assert [model for model, _ in published.beside(scores)] == list(published.MODELS)
  image = TASKS["seed"](tmp_path).variant
  assert published.beside(dataclasses.replace(SCORES, task="seed", variant=image)) == []


def test_the_first_questions_are_no_result_of_the_benchmark(task: Made, tmp_path: Path) -> None:
  scores = run.run(task, Scripted(), tmp_path / "out", limit=30)
  assert (scores.asked, scores.questions) == (30, 300)
  everything = "".join(Reader((tmp_path / "out" / page.FILE).read_text()).texts)
  assert "Over 30 of 30 questions, the first of 300: not the benchmark's result." in everything
  assert "Published by others" not in everything


def test_bars_show_what_the_headline_speaks_of() -> None:
  row = {"accuracy": 0.5, "f1": 0.25, "items": 3, "asked": 4}
  scores = dataclasses.replace(SCORES, metric="mean F1 of the splits", by_kind={"all": row})
  assert tables.bars(scores) == [("all", 0.25, "25.00%", 3)]
  assert tables.figure(dataclasses.replace(scores, metric="perception score")) == "accuracy"


@pytest.mark.parametrize(
  ("name", "value", "text", "full"),
  [("accuracy", 1.0, "100.00%", 1.0), ("f1", 0.5, "50.00%", 1.0), ("score", 1.0, "1.0", 1.0),
   ("score", 0.5, "0.5", 0.5), ("TP", 1, "1", 1), ("TP", 1430, "1430", 1430),
   ("score", 0.0, "0.0", 1.0)],
)  # fmt: skip
def test_a_figure_s_unit_is_told_by_its_name(
  name: str, value: float, text: str, full: float
) -> None:
  row = {name: value, "items": 3, "asked": 4}
  scores = dataclasses.replace(SCORES, headline=value, metric=name, by_kind={"all": row})
  assert tables.cells(scores)[1] == [["all", "3", "4", text]]
  assert tables.headline(scores) == f"{text} {name}"
  assert tables.full(scores) == full


def test_every_figure_of_the_benchmarks_has_its_unit(tmp_path: Path) -> None:
  """Shares are in the set of shares, all others are no shares."""
  points = {"mme": {"score"}, "pope": {"TP", "FP", "TN", "FN"}}
  for name, write in formats.WRITERS.items():
    write(tmp_path)
    task = TASKS[name](tmp_path)
    scores = task.score(task.items(), {})
    rows = dataclasses.replace(SCORES, by_kind=scores.by_kind, metric=scores.metric)
    assert set(tables.figures(rows)) - tables.SHARES == points.get(name, set())


def test_an_unreadable_picture_is_a_failure_on_the_page(task: Made, tmp_path: Path) -> None:
  (tmp_path / "4.png").write_bytes(b"no picture")
  engine = Scripted(texts=["yes"], fails={"4.png": "cannot be decoded <b>"})
  scores = run.run(task, engine, tmp_path / "out")
  everything = "".join(Reader((tmp_path / "out" / page.FILE).read_text()).texts)
  assert "Without an answer: 25" in everything
  assert "cannot be decoded <b>" in everything
  assert f"Over 275 of 300 questions; {len(scores.failures)} without" in everything
  assert scores.headline == 1.0


def test_flips_against_another_run(task: Made, tmp_path: Path) -> None:
  """Every way in which two runs may differ, and the exact test of McNemar."""
  old, new = tmp_path / "old", tmp_path / "new"
  run.run(task, Scripted(texts=["yes", "no", "no", "no"]), old)
  scores = run.run(task, Scripted(texts=["yes", "yes", "No", "no"]), new, compare=old)
  counts = scores.compared
  assert (counts.both, counts.fixed, counts.broken, counts.changed) == (300, 75, 0, 75)
  assert counts.p_value == pytest.approx(2 / 2**75)
  everything = "".join(Reader((new / page.FILE).read_text()).texts)
  assert "75 fixed, 0 broken, 75 in other words with the same score" in everything
  assert "before: no" in everything
  back = compare.compare(old, new)
  assert (len(back.fixed), len(back.broken), len(back.changed)) == (0, 75, 75)


@pytest.mark.parametrize(
  ("fixed", "broken", "p"), [(0, 0, 1.0), (1, 0, 1.0), (5, 5, 1.0), (8, 1, 20 / 512)]
)
def test_mcnemar_s_exact_test(fixed: int, broken: int, p: float) -> None:
  flip: Any = None
  found = compare.Flips("x", [flip] * fixed, [flip] * broken, [], 20, ())
  assert found.p_value == pytest.approx(p)


def test_other_questions_are_not_compared(task: Made, tmp_path: Path) -> None:
  run.run(task, Scripted(), tmp_path / "a")
  other = Made(tmp_path, count=30)
  with pytest.raises(EvalError, match=r"answers to other questions.*data_hash"):
    run.run(other, Scripted(), tmp_path / "b", compare=tmp_path / "a")
  assert not (tmp_path / "b").exists(), "it is told before anything is asked"
  with pytest.raises(EvalError, match=r"gone: no settings\.json"):
    run.run(task, Scripted(), tmp_path / "c", compare=tmp_path / "gone")
  assert not (tmp_path / "c").exists()


def test_a_score_of_a_server_is_said_to_be_one(task: Made, tmp_path: Path) -> None:
  class Server(Made):
    def verdict(self, item: Item, text: str) -> dict[str, Any]:
      return {}

    def score(self, items: list[Item], predictions: Predictions) -> Scores:
      return Scores(None, "scored by a server", {"all": {"items": len(items), "asked": len(items)}})

    def submission(self, items: list[Item], predictions: Predictions, folder: Path) -> list[Path]:
      (folder / "upload.json").write_text("[]")
      return [folder / "upload.json"]

  scores = run.run(Server(tmp_path), Scripted(), tmp_path / "out")
  assert scores.interval is None
  found = Reader((tmp_path / "out" / page.FILE).read_text())
  assert "scored by a server (submission/upload.json)" in "".join(found.texts)
  assert found.classes["unsaid"] == 12
  assert found.tags["rect"] == 0
  assert tables.markdown(*tables.cells(scores)).splitlines()[-1] == "| all | 300 | 300 |"
