"""A benchmark between the steps: the scores of its checkpoint, and a training that does not notice."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.distributed import mesh, processes
from llava_sp_jax.eval import in_loop, run
from llava_sp_jax.infer import pretrained
from llava_sp_jax.infer.engine import Engine
from llava_sp_jax.results import predictions
from llava_sp_jax.tasks import easy_vqa
from llava_sp_jax.tasks.catalog import TASKS
from llava_sp_jax.tasks.task import Item, Predictions, Scores
from llava_sp_jax.tools import train as train_tool
from llava_sp_jax.training import loop, setup, state
from tests.conftest import ConfigMaker
from tests.end_to_end.cluster import Cluster, Topology, write_config

STEPS, EVERY, LIMIT = 7, 3, 6


@pytest.fixture(scope="module")
def config(tiny_config: ConfigMaker, tiny_data: Path) -> Any:
  def make(**evaluate: Any) -> config_lib.Config:
    return tiny_config(
      train={"steps": STEPS, "save_every": EVERY, "keep": 9},
      evaluate={
        "every": EVERY,
        "data": str(tiny_data),
        "limit": LIMIT,
        "batch_size": 8,
        **evaluate,
      },
    )

  return make


@pytest.fixture(scope="module")
def watched(config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Trained by the command, as users do."""
  folder = tmp_path_factory.mktemp("watched")
  file = write_config(config(), folder / "tiny.py")
  assert train_tool.main([f"--config={file}", f"--workdir={folder / 'run'}"]) == 0
  return folder / "run"


def records(folder: Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_scores_are_logged_where_they_are_due(watched: Path) -> None:
  scored = [r for r in records(watched) if "eval_score" in r]
  assert [r["step"] for r in scored] == [3, 6, 7]
  for record in scored:
    out = watched / in_loop.FOLDER / f"step-{record['step']}"
    found = json.loads((out / "scores.json").read_text())
    assert record["eval_score"] == found["headline"]
    assert record["eval_answered"] == found["answered"] == LIMIT
    assert record["eval_score/shape"] == found["by_kind"]["shape"]["accuracy"]
    assert found["step"] == record["step"]
    assert (out / "index.html").is_file()
    assert predictions.read_file(out / "predictions.jsonl")


def test_the_steps_are_three_states_of_one_engine(watched: Path) -> None:
  """Each evaluation sees the parameters of its step, and only the first one compiles."""
  found = [
    json.loads((watched / in_loop.FOLDER / f"step-{n}" / "scores.json").read_text())
    for n in (3, 6, 7)
  ]
  assert len({f["fingerprint"]["loaded"] for f in found}) == 3
  assert len({f["fingerprint"]["base"] for f in found}) == 1
  assert [f["engine"]["compiles"] > 0 for f in found] == [True, False, False]
  assert [f["engine"]["encoder_calls"] for f in found] == [LIMIT] * 3


def test_equals_the_score_of_the_saved_checkpoint(
  watched: Path, tiny_data: Path, tmp_path: Path
) -> None:
  """Text by text: what is logged is what `llava-sp eval` says of the checkpoint of that step."""
  loaded = pretrained.from_run(watched, merge=False)
  task = TASKS["easy_vqa"](tiny_data)
  run.run(task, Engine(loaded, 8, task.generation), tmp_path, LIMIT)
  here = watched / in_loop.FOLDER / f"step-{STEPS}"
  texts = [
    [r["text"] for r in predictions.read_file(f / "predictions.jsonl")] for f in (here, tmp_path)
  ]
  assert texts[0] == texts[1]
  assert len(set(texts[0])) >= 1
  settings = [
    predictions.read_settings(folder)["settings"]["fingerprint"] for folder in (here, tmp_path)
  ]
  assert settings[0] == settings[1], "the same parameters, to the last bit"


@pytest.mark.guard
def test_training_does_not_notice(config: Any, watched: Path, tmp_path: Path) -> None:
  loop.train(config(every=0), tmp_path / "run")
  losses = [[r["loss"] for r in records(folder)] for folder in (watched, tmp_path / "run")]
  assert losses[0] == losses[1]
  assert not (tmp_path / "run" / in_loop.FOLDER).exists()


@pytest.mark.guard
def test_a_run_that_goes_on_does_the_step_again(config: Any, watched: Path, tmp_path: Path) -> None:
  """From the checkpoint of step 6, in which step 7 was scored already; other settings are taken."""
  folder = tmp_path / "run"
  shutil.copytree(watched, folder)
  shutil.rmtree(folder / "checkpoints" / "7")
  settings = config(limit=3)
  loop.train(settings, folder, evaluator=in_loop.InLoop(settings, folder))
  scored = [r for r in records(folder) if "eval_score" in r]
  assert [r["eval_answered"] for r in scored] == [LIMIT, LIMIT, 3]


@pytest.mark.guard
def test_stopping_does_not_wait_for_it(config: Any, tmp_path: Path) -> None:
  """Asked to stop in the middle of an evaluation, it is left out; the run can save at once."""
  settings = config()
  evaluator = in_loop.InLoop(settings, tmp_path)
  train_state, *_ = setup.initial_state(settings, mesh.create(settings.mesh, 8))
  params = state.join(train_state.trainable, train_state.frozen)
  asked: list[int] = []

  def going() -> bool:
    asked.append(1)
    return len(asked) < 3

  assert evaluator(1, params, "base", going) == {}
  assert len(asked) == 3
  assert evaluator(1, params, "base", lambda: True)["eval_answered"] == LIMIT
  jax.block_until_ready(params)
  assert all(np.isfinite(np.asarray(x)).all() for x in train_state.trainable.values())


@pytest.mark.parametrize(
  ("values", "error", "message"),
  [
    ({"task": "vqa"}, config_lib.ConfigError, "evaluate.task: unknown 'vqa'; known: "),
    ({"data": "gone"}, FileNotFoundError, "gone/test.json: no such file"),
    ({"batch_size": 0}, config_lib.ConfigError, r"evaluate.batch_size: expected at least 1 .*, found 0"),
  ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_first(
  config: Any, tmp_path: Path, values: dict[str, Any], error: type, message: str
) -> None:
  file = write_config(config(**values), tmp_path / "c.py")
  with pytest.raises(error, match=message):
    train_tool.main([f"--config={file}", f"--workdir={tmp_path / 'run'}"])
  assert not (tmp_path / "run").exists()


def test_a_task_that_a_server_scores_has_nothing_to_log(
  config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  class Server(easy_vqa.EasyVqa):
    def score(self, items: list[Item], predictions: Predictions) -> Scores:
      return Scores(None, "server", {})

  monkeypatch.setitem(TASKS, "easy_vqa", Server)
  with pytest.raises(config_lib.ConfigError, match=r"no score to log \(a server scores it\)"):
    in_loop.InLoop(config(), tmp_path)


@pytest.mark.guard
def test_processes_evaluate_together(config: Any, tiny_data: Path, tmp_path: Path) -> None:
  """Two of eight devices each, which share parameters, answer as one device does, though only the
  first process can read the pictures. All axes of the mesh divide something.
  """
  data = tmp_path / "data"
  shutil.copytree(tiny_data, data)
  lost = TASKS["easy_vqa"](data).items()[2].images[0]
  assert isinstance(lost, Path)
  lost.unlink()
  wide = dataclasses.replace(config(data=str(data)).train, batch_size=8)
  file = write_config(dataclasses.replace(config(data=str(data)), train=wide), tmp_path / "tiny.py")
  Cluster(file, tmp_path / "run", Topology(2, 8, (2, 4, 2))).finish()
  scored = [r for r in records(tmp_path / "run") if "eval_score" in r]
  assert [r["step"] for r in scored] == [3, 6, 7]
  here = tmp_path / "run" / in_loop.FOLDER / f"step-{STEPS}"
  found = json.loads((here / "scores.json").read_text())
  broken = [i.id for i in TASKS["easy_vqa"](data).items()[:LIMIT] if i.images[0] == lost]
  assert [f["id"] for f in found["failures"]] == broken
  assert str(lost) in found["failures"][0]["error"]
  assert found["answered"] == LIMIT - len(broken)

  loaded = pretrained.from_run(tmp_path / "run", merge=False)
  task = TASKS["easy_vqa"](data)
  run.run(task, Engine(loaded, 8, task.generation), tmp_path / "alone", LIMIT)
  texts = [
    [r["text"] for r in predictions.read_file(f / "predictions.jsonl")]
    for f in (here, tmp_path / "alone")
  ]
  assert texts[0] == texts[1]


def test_settings_without_an_evaluator_are_not_ignored(
  config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(processes, "start", lambda *_, **__: pytest.fail("it went on"))
  with pytest.raises(config_lib.ConfigError, match=r"evaluate\.every: nothing to evaluate with"):
    loop.train(config(), tmp_path / "run")
