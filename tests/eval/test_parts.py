"""A task that several hosts answer: parts, their settings, and who merges."""

from __future__ import annotations

import concurrent.futures
import threading
from pathlib import Path
from typing import Any

import jax
import pytest

from llava_sp_jax.distributed import processes
from llava_sp_jax.eval import run as run_lib
from llava_sp_jax.eval.evaluate import evaluate
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.results import predictions
from llava_sp_jax.results.predictions import Part
from llava_sp_jax.tasks.easy_vqa import EasyVqa
from llava_sp_jax.tasks.task import EvalError, Item
from tests.eval.scripted import Scripted, by_id


def test_one_part_is_written_by_one_process(tiny_data: Path, tmp_path: Path) -> None:
  with (
    predictions.PredictionWriter(tmp_path, Part()),
    pytest.raises(EvalError, match="another process is writing it"),
  ):
    predictions.PredictionWriter(tmp_path, Part())
  predictions.PredictionWriter(tmp_path, Part()).__exit__()


def test_parts_write_their_own_and_the_last_merges(tiny_data: Path, tmp_path: Path) -> None:
  task = EasyVqa(tiny_data)
  whole = run_lib.run(task, Scripted(), tmp_path / "whole")
  out, engines = tmp_path / "parts", [Scripted(), Scripted(), Scripted()]
  for i in (0, 2):
    said = run_lib.run(task, engines[i], out, part=Part(i, 3))
    assert said.part == f"{i}/3"
    assert said.missing == 12 - said.answered > 0
    assert not (out / "scores.json").exists()
  with pytest.raises(EvalError, match=r"4 of 12 questions were not asked yet \(test-1"):
    run_lib.finish(task, out)
  scores = run_lib.run(task, engines[1], out, part=Part(1, 3))
  assert sorted(path.name for path in out.glob("predictions*")) == [
    "predictions.0-of-3.jsonl",
    "predictions.1-of-3.jsonl",
    "predictions.2-of-3.jsonl",
    "predictions.jsonl",
  ]
  asked = [image for engine in engines for image in engine.asked]
  assert len(asked) == len(set(asked)) == 12
  assert sorted(n for engine in engines for n in engine.numbers if n is not None) == list(range(12))
  assert scores.by_kind == whole.by_kind
  assert scores.sessions == 3
  assert scores.engine["requests"] == 12
  assert by_id(out) == by_id(tmp_path / "whole")
  assert run_lib.finish(task, out) == scores


def test_another_number_of_hosts_finishes_what_some_began(tiny_data: Path, tmp_path: Path) -> None:
  task, alone = EasyVqa(tiny_data), Scripted()
  run_lib.run(task, Scripted(), tmp_path, part=Part(1, 3))
  scores = run_lib.run(task, alone, tmp_path)
  assert len(alone.asked) == 8
  assert scores.answered == 12


def test_a_part_keeps_the_questions_of_an_image_together() -> None:
  items = [Item(f"{i}", "q", (Path(f"{i % 7}.png"),), "k", None) for i in range(40)]
  parts = [Part(i, 3).choose(items) for i in range(3)]
  assert sorted(int(item.id) for part in parts for item in part) == list(range(40))
  images = [{item.images for item in part} for part in parts]
  assert sum(len(part) for part in images) == 7
  assert max(map(len, parts)) - min(map(len, parts)) <= 6


def test_questions_about_no_image_are_divided_too() -> None:
  items = [Item(f"{i}", "q", (), "k", None) for i in range(40)]
  parts = [Part(i, 3).choose(items) for i in range(3)]
  assert sorted(int(item.id) for part in parts for item in part) == list(range(40))
  assert sorted(map(len, parts)) == [13, 13, 14]


def test_hosts_that_start_at_once_do_not_disturb_each_other(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Each sees no settings and writes them, though all have the same process id."""
  monkeypatch.setattr("os.getpid", lambda: 1)
  together = threading.Barrier(8)
  kept = predictions.replace

  def at_once(path: Path, text: str) -> None:
    together.wait(30)
    for _ in range(20):
      kept(path, text)

  monkeypatch.setattr(predictions, "replace", at_once)
  with concurrent.futures.ThreadPoolExecutor(8) as hosts:
    list(hosts.map(lambda _: predictions.check_settings(tmp_path, {"a": 1}, {}), range(8)))
  assert [path.name for path in tmp_path.iterdir()] == [predictions.SETTINGS]


def test_a_host_that_is_a_moment_late_takes_the_settings_of_the_first(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The first writes its settings and an answer while the second looks."""
  looks = Path.glob

  def first_is_faster(folder: Path, pattern: str) -> Any:
    monkeypatch.setattr(Path, "glob", looks)
    predictions.check_settings(folder, {"a": 1}, {})
    (folder / "predictions.0-of-2.jsonl").write_text("")
    return folder.glob(pattern)

  monkeypatch.setattr(Path, "glob", first_is_faster)
  predictions.check_settings(tmp_path, {"a": 1}, {})


@pytest.mark.parametrize("text", ["2/2", "1", "a/b", "-1/2", "0/0"])
def test_parts_that_are_none(text: str) -> None:
  with pytest.raises(EvalError, match=r"--part: expected I/N|parts are counted from 0/N"):
    predictions.parse_part(text)
  assert str(predictions.parse_part("1/2")) == "1/2"


def test_processes_of_evaluate_wait_for_each_other(
  tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Each gets the scores over the answers of all, whichever is the last to answer."""
  task, asked = EasyVqa(tiny_data), []

  class Model:
    def engine(self, generation: Generation) -> Scripted:
      asked.append(Scripted())
      return asked[-1]

  def other_process(*_: Any) -> None:
    run_lib.ask(task, Scripted(), tmp_path, part=Part(1, 2))

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes, "barrier", other_process)
  model: Any = Model()
  scores = evaluate(model, task, out=tmp_path)
  assert 0 < len(asked[0].asked) < 12
  assert (scores.answered, scores.questions, scores.sessions) == (12, 12, 2)
