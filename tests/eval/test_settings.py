"""What an answer depends on is compared key by key; evaluations between steps; shares of hosts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.eval import identity, in_loop
from llava_sp_jax.eval import run as run_lib
from llava_sp_jax.infer.engine import Answer
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.results import predictions
from llava_sp_jax.results.predictions import Part
from llava_sp_jax.tasks.easy_vqa import EasyVqa
from llava_sp_jax.tasks.task import EvalError, Item
from tests.checkpoints.config_keys import another, changed, keys
from tests.conftest import ConfigMaker
from tests.eval.scripted import Scripted, by_id

# Of the model, what answers do not depend on; of the data, what they do.
FASTER = {"frozen_dtype", "scan_unroll", "remat", "attention"}
READS = {
  "template",
  "image_aspect",
  "image_fit",
  "image_resample",
  "grid_pinpoints",
  "patch_merge",
  "image_mean",
  "image_std",
}


@pytest.mark.parametrize(
  "key",
  [
    k.removeprefix("config.")
    for k, _ in keys(config_lib.Config())
    if k.startswith(("config.model.", "config.data."))
  ],
)
def test_every_key_that_answers_depend_on_is_in_their_settings(key: str) -> None:
  """All of the model but what only makes it faster; of the data, what a question becomes."""
  engine = Scripted()
  config = engine.pretrained.config
  other = changed(config, key, another(dict(keys(config))[f"config.{key}"]))
  before = identity.reads(engine.pretrained)
  after = identity.reads(dataclasses.replace(engine.pretrained, config=other))
  name = key.split(".")[1]
  matters = name not in FASTER if key.startswith("model.") else name in READS
  lines = predictions.differences(after, before)
  assert (lines != []) == matters
  assert all(key.rsplit(".", 1)[1] in line for line in lines)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Generation)])
def test_every_setting_of_generation_is_compared(
  tiny_data: Path, tmp_path: Path, field: str
) -> None:
  task = EasyVqa(tiny_data)
  run_lib.run(task, Scripted(), tmp_path, limit=2)
  engine = Scripted()
  values = {
    "max_new_tokens": 9,
    "temperature": 0.5,
    "top_k": 3,
    "top_p": 0.5,
    "num_beams": 2,
    "stop": ("x",),
    "seed": 4,
    "min_p": 0.1,
    "min_new_tokens": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "logit_bias": ((3, 1.0),),
    "stop_ids": (3,),
    "ignore_eos": True,
    "log_probabilities": 2,
  }
  engine._generation = dataclasses.replace(engine._generation, **{field: values[field]})
  with pytest.raises(EvalError, match=rf"generation\.{field}: .* here, .* there"):
    run_lib.run(task, engine, tmp_path, limit=2)


def test_answers_of_another_version_are_refused(
  tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  run_lib.run(EasyVqa(tiny_data), Scripted(), tmp_path, limit=2)
  monkeypatch.setattr(identity, "__version__", "99.1")
  with pytest.raises(EvalError, match=r"version: '99\.1' here, '[\d.]+\w*' there"):
    run_lib.run(EasyVqa(tiny_data), Scripted(), tmp_path, limit=2)


def test_a_folder_with_former_names_of_keys_goes_on(tiny_data: Path, tmp_path: Path) -> None:
  task, path = EasyVqa(tiny_data), tmp_path / predictions.SETTINGS
  before = run_lib.run(task, Scripted(), tmp_path, limit=2)
  saved = json.loads(path.read_text())
  projector = saved["settings"]["model"]["projector"]
  projector["row"] = projector.pop("variant")
  path.write_text(old := json.dumps(saved))
  after = run_lib.run(task, engine := Scripted(), tmp_path, limit=4)
  assert after.model == before.model
  assert after.asked == 4
  assert len(engine.asked) == 2
  assert path.read_text() == old
  projector["row"] = "both"
  path.write_text(json.dumps(saved))
  with pytest.raises(EvalError, match=r"model\.projector\.variant: '\w+' here, 'both' there"):
    run_lib.run(task, Scripted(), tmp_path, limit=4)


def test_a_line_says_how_narrow_an_answer_was(tiny_data: Path) -> None:
  task = EasyVqa(tiny_data)
  (item, *_) = task.items()
  right = run_lib.record(task, item, Answer(item.truth, (1, 2), margin=0.123456))
  assert right["margin"] == 0.1235
  assert right["verdict"] == {"score": 1.0}
  assert (right["id"], right["truth"], right["kind"]) == (item.id, item.truth, item.kind)
  failed = run_lib.record(task, item, Answer("", (), "no such file", margin=float("inf")))
  assert (failed["margin"], failed["verdict"], failed["error"]) == (None, {}, "no such file")


def test_hosts_have_like_numbers_of_questions_not_of_images() -> None:
  """One image has as many questions as all others together."""
  items = [Item(f"{i}", "q", (Path(f"{max(0, i - 20)}.png"),), "k", None) for i in range(41)]
  sizes = [len(Part(i, 2).choose(items)) for i in range(2)]
  assert sum(sizes) == 41
  assert abs(sizes[0] - sizes[1]) <= 1


# ---- between the steps of training ------------------------------------------------------------------


class Loaded(Scripted):
  """Says how large the parameters are that it was given."""

  def load(self, pretrained: Any) -> None:
    self.pretrained = pretrained
    self._texts = [str(float(np.asarray(pretrained.params["projector"]["w"]).sum()))]


@pytest.fixture
def evaluator(tiny_config: ConfigMaker, tiny_data: Path, tmp_path: Path) -> in_loop.InLoop:
  config = tiny_config(
    model={"dtype": "bfloat16"},
    train={"steps": 7},
    evaluate={"every": 3, "data": str(tiny_data), "limit": 4},
  )
  made = in_loop.InLoop(config, tmp_path / "run")
  made._engine = Loaded()
  return made


def params(value: float) -> dict[str, Any]:
  return {"projector": {"w": jnp.full(2, value, jnp.float32)}}


def test_each_evaluation_is_of_its_step_s_parameters(
  evaluator: in_loop.InLoop, tmp_path: Path
) -> None:
  """In the dtype that the model computes in; what is left of another attempt is gone."""
  for number, value in ((3, 1.0), (6, 2.0), (3, 4.0)):
    found = evaluator(number, params(value), "base", lambda: True)
    assert found["eval_answered"] == 4
    folder = tmp_path / "run" / in_loop.FOLDER / f"step-{number}"
    assert {r["text"] for r in by_id(folder).values()} == {str(2 * value)}
    scores = json.loads((folder / "scores.json").read_text())
    assert (scores["step"], scores["fingerprint"]["base"]) == (number, "base")
    engine = evaluator._engine
    assert engine
    assert str(engine.pretrained.params["projector"]["w"].dtype) == "bfloat16"
  assert evaluator(6, params(1.0), "base", lambda: False) == {}


def test_when_an_evaluation_is_due(evaluator: in_loop.InLoop) -> None:
  assert [n for n in range(1, 8) if evaluator.due(n, n == 7)] == [3, 6, 7]


def test_scores_by_kind_are_logged_with_the_headline(evaluator: in_loop.InLoop) -> None:
  evaluator._engine = Loaded()
  task = evaluator._task
  truths = [item.truth for item in task.items()[:4]]
  engine: Any = evaluator._engine
  engine.load = lambda loaded: setattr(engine, "pretrained", loaded)
  engine._texts = [truths[-1], *truths[:-1]]  # `Scripted` begins with the second
  found = evaluator(3, params(1.0), "base", lambda: True)
  assert found["eval_score"] == 1.0
  kinds = {item.kind for item in task.items()[:4]}
  assert {k: v for k, v in found.items() if "/" in k} == {f"eval_score/{k}": 1.0 for k in kinds}
