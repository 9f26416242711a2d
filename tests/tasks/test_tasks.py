"""Every benchmark from its official files to scores and submissions."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from llava_sp_jax.config import ConfigError
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.tasks.benchmark import Benchmark
from llava_sp_jax.tasks.catalog import BENCHMARKS, TASKS
from tests.tasks import formats
from tests.tasks.formats import RIGHT, answers, right

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


def test_options_are_what_the_constructors_take() -> None:
  import inspect

  for task in BENCHMARKS:
    assert issubclass(task, Benchmark)
    taken = list(inspect.signature(task).parameters)
    assert taken == ["folder", *task.options]
