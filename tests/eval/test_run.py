"""A task through the real engine: predictions, scores, failures that are counted, and the report."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from llava_sp_jax import __version__
from llava_sp_jax.eval import identity
from llava_sp_jax.eval import run as run_lib
from llava_sp_jax.infer.engine import Answer, Engine, Request
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.results import predictions, report
from llava_sp_jax.results import scores as scores_lib
from llava_sp_jax.tasks.easy_vqa import EasyVqa
from llava_sp_jax.tasks.task import EvalError, Item
from tests.eval.scripted import Scripted, by_id


@pytest.fixture
def damaged(tiny_data: Path, tmp_path: Path) -> Path:
  """The test split with one broken and one missing picture."""
  folder = tmp_path / "data"
  shutil.copytree(tiny_data, folder)
  (folder / "images" / "3.png").write_bytes(b"no picture")
  (folder / "images" / "5.png").unlink()
  return folder


def test_an_unreadable_image_is_a_counted_failure(
  engine: Engine, run_folder: Path, damaged: Path, tmp_path: Path
) -> None:
  out = tmp_path / "eval"
  scores = run_lib.run(EasyVqa(damaged), engine, out)
  assert [f.id for f in scores.failures] == ["test-3", "test-5"]
  assert "cannot be decoded" in scores.failures[0].error
  assert "no such file" in scores.failures[1].error
  assert (scores.asked, scores.answered) == (12, 10)
  everything = scores.by_kind["all"]
  assert (everything["items"], everything["asked"]) == (10, 12)
  records = predictions.read_file(out / "predictions.jsonl")
  assert [r["id"] for r in records] == [f"test-{i}" for i in range(12)]
  assert scores_lib.read(out / scores_lib.FILE) == scores
  for record in records:
    if not record["error"]:
      assert record["verdict"]["score"] == (record["text"].strip() == record["truth"])
  page = report.write([str(run_folder)], str(out), str(tmp_path / "report"))
  assert "Over 10 of 12 questions; 2 without an answer" in page
  for name in ("loss.png", "accuracy.png", "answers.png"):
    with Image.open(tmp_path / "report" / name) as picture:
      assert min(picture.size) > 100
  assert (tmp_path / "report" / "report.md").read_text() == page
  assert scores_lib.read(tmp_path / "report" / scores_lib.FILE) == scores


def test_images_that_were_put_back_are_asked_again_on_request(
  tiny_data: Path, tmp_path: Path
) -> None:
  task, out = EasyVqa(tiny_data), tmp_path / "eval"
  before = run_lib.run(task, Scripted(fails={"3.png": "gone", "5.png": "gone"}), out)
  assert len(before.failures) == 2
  assert run_lib.run(task, Scripted(), out).failures == before.failures
  after = run_lib.run(task, Scripted(fails={"3.png": "remembered"}), out, retry=True)
  assert after.failures == ()
  assert by_id(out)["test-3"]["text"] == "yes"
  asked = [json.loads(line)["asked"] for line in (out / "sessions.jsonl").read_text().splitlines()]
  assert asked == [12, 0, 2]


def test_scores_say_what_they_are_of(engine: Engine, tiny_data: Path, tmp_path: Path) -> None:
  task = EasyVqa(tiny_data)
  model = identity.ModelIdentity.of(engine.pretrained, "runs/x")
  scores = run_lib.run(task, engine, tmp_path, model=model)
  assert scores.task == "easy_vqa"
  assert scores.protocol == task.protocol
  assert scores.data_hash == task.data_hash()
  assert scores.fingerprint == {"base": engine.pretrained.fingerprint, "loaded": model.loaded}
  assert scores.generation["max_new_tokens"] == engine.generation.max_new_tokens
  assert (scores.version, scores.checkpoint) == (__version__, "runs/x")
  assert scores.step == engine.pretrained.step == 2
  assert scores.engine["requests"] == 12
  sure = scores.interval
  assert sure.low <= sure.mean == scores.headline <= sure.high
  assert "bootstrap over 12 images" in sure.method


def test_the_fingerprint_of_what_was_loaded_sees_the_trained_part(engine: Engine) -> None:
  loaded = engine.pretrained
  leaves, tree = jax.tree.flatten(loaded.params)
  largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
  changed = np.array(leaves[largest])
  changed.flat[0] += 1e-3
  leaves[largest] = changed
  other = dataclasses.replace(loaded, params=jax.tree.unflatten(tree, leaves))
  one, two = identity.ModelIdentity.of(loaded), identity.ModelIdentity.of(other)
  assert one.loaded != two.loaded
  assert one.base == two.base


def test_limit_takes_the_first_items_and_may_grow(
  engine: Engine, tiny_data: Path, tmp_path: Path
) -> None:
  few = run_lib.run(EasyVqa(tiny_data), engine, tmp_path, limit=3)
  assert few.by_kind["all"]["items"] == 3
  more = run_lib.run(EasyVqa(tiny_data), engine, tmp_path, limit=5)
  assert (more.asked, more.engine["requests"]) == (5, 5)
  assert run_lib.run(EasyVqa(tiny_data), engine, tmp_path, limit=3).by_kind == few.by_kind
  assert len(by_id(tmp_path)) == 5


def test_numbers_that_count_nothing_are_refused(
  loaded: Pretrained, tiny_data: Path, tmp_path: Path
) -> None:
  with pytest.raises(EvalError, match=r"limit: expected 0 \(all questions\) or more, found -5"):
    run_lib.run(EasyVqa(tiny_data), Scripted(), tmp_path / "out", limit=-5)
  assert not (tmp_path / "out").exists()
  for size in (0, -1):
    with pytest.raises(ValueError, match=f"batch_size: expected at least 1, found {size}"):
      Engine(loaded, size)


def test_answers_do_not_depend_on_the_batch(engine: Engine, tiny_data: Path) -> None:
  requests = [
    Request(q, (tiny_data / "images" / f"{i}.png",))
    for i, q in enumerate(["what is it?", "is it blue or red or green?", "red?"])
  ]
  together = [a.ids for a in engine.answer(requests)]
  alone = [next(iter(engine.answer([r]))).ids for r in requests]
  assert together == alone
  with Image.open(tiny_data / "images" / "0.png") as picture:
    assert next(iter(engine.answer([Request("what is it?", (picture,))]))).ids == alone[0]


# What follows asks an engine that answers from a script, for it is about files, not about answers.


def test_a_broken_run_goes_on_where_it_was(tiny_data: Path, tmp_path: Path) -> None:
  """An engine that dies in between: nothing is asked twice, the scores are those of an unbroken run."""
  task = EasyVqa(tiny_data)
  whole = run_lib.run(task, Scripted(), tmp_path / "whole")
  broken = Scripted(dies_after=5)
  with pytest.raises(ZeroDivisionError):
    run_lib.run(task, broken, tmp_path / "broken")
  assert not (tmp_path / "broken" / "scores.json").exists()
  path = tmp_path / "broken" / "predictions.jsonl"
  path.write_bytes(path.read_bytes()[:-7])  # as a kill in the middle of a line
  again = Scripted()
  scores = run_lib.run(task, again, tmp_path / "broken")
  assert len(again.asked) == 12 - 4
  assert again.numbers == list(range(4, 12)), "a sample is drawn by the place in the whole set"
  assert path.read_bytes() == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
  assert scores == dataclasses.replace(whole, seconds=scores.seconds, engine=scores.engine)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"text": "other"}, "fingerprint.loaded: 'other' here, 'scripted' there"),
    ({"tokens": 9}, "generation.max_new_tokens: 9 here, 4 there"),
  ],
)
def test_other_settings_are_refused(
  tiny_data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
  task = EasyVqa(tiny_data)
  run_lib.run(task, Scripted(), tmp_path, model=identity.ModelIdentity("", 0, "", "scripted"))
  before = (tmp_path / "predictions.jsonl").read_bytes()
  model = identity.ModelIdentity("", 0, "", change.get("text", "scripted"))
  engine = Scripted(tokens=change.get("tokens", 4))
  with pytest.raises(EvalError, match=f"(?s){message}.*name another folder with --out"):
    run_lib.run(task, engine, tmp_path, model=model)
  assert (tmp_path / "predictions.jsonl").read_bytes() == before
  assert engine.asked == []


def test_answers_of_another_version_are_refused(
  tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  task = EasyVqa(tiny_data)
  run_lib.run(task, Scripted(), tmp_path)
  monkeypatch.setattr(identity, "__version__", "9.9")
  engine = Scripted()
  with pytest.raises(EvalError, match=f"version: '9.9' here, '{__version__}' there"):
    run_lib.run(task, engine, tmp_path)
  assert engine.asked == []


@pytest.mark.parametrize(
  ("part", "key", "value", "message"),
  [("data", "template", "llama_2", "inputs.template: 'llama_2' here, 'v1' there"),
   ("data", "image_aspect", "square", "inputs.image_aspect: 'square' here, 'pad' there"),
   ("model", "dtype", "float32", "model.dtype: 'float32' here, 'bfloat16' there")],
)  # fmt: skip
def test_a_model_that_reads_otherwise_is_refused(
  tiny_data: Path, tmp_path: Path, part: str, key: str, value: str, message: str
) -> None:
  """The same parameters, but other prompts, pictures or arithmetic."""
  task = EasyVqa(tiny_data)
  scores = run_lib.run(task, Scripted(), tmp_path)
  assert scores.inputs["tokenizer"] == Scripted().pretrained.tokenizer.fingerprint()
  engine = Scripted()
  group = dataclasses.replace(getattr(engine.pretrained.config, part), **{key: value})
  config = dataclasses.replace(engine.pretrained.config, **{part: group})
  engine.pretrained = dataclasses.replace(engine.pretrained, config=config)
  with pytest.raises(EvalError, match=message):
    run_lib.run(task, engine, tmp_path)
  assert engine.asked == []
  faster = dataclasses.replace(config.model, remat="none", scan_unroll=4, dtype="bfloat16")
  config = dataclasses.replace(Scripted().pretrained.config, model=faster)
  engine.pretrained = dataclasses.replace(engine.pretrained, config=config)
  assert run_lib.run(task, engine, tmp_path).by_kind == scores.by_kind


def test_other_data_are_refused(damaged: Path, tmp_path: Path) -> None:
  out = tmp_path / "out"
  run_lib.run(EasyVqa(damaged), Scripted(), out)
  (damaged / "test.json").write_text((damaged / "test.json").read_text() + " ")
  with pytest.raises(EvalError, match=r"data_hash: '\w+' here, '\w+' there"):
    run_lib.run(EasyVqa(damaged), Scripted(), out)
  with pytest.raises(EvalError, match="another task: data_hash"):
    run_lib.finish(EasyVqa(damaged), out)


def test_a_judge_may_come_later(tiny_data: Path, tmp_path: Path) -> None:
  """Who reads the answers is part of the protocol, but not of what the answers depend on."""
  task, engine = EasyVqa(tiny_data), Scripted()
  task.protocol = "a rule; no judge"
  assert run_lib.run(task, engine, tmp_path).protocol == "a rule; no judge"
  task.protocol = "a rule; judge someone"
  assert run_lib.finish(task, tmp_path).protocol == "a rule; judge someone"
  task.protocol = "another rule; judge someone"
  with pytest.raises(EvalError, match="'another rule' here, 'a rule' there"):
    run_lib.run(task, engine, tmp_path)
  assert len(engine.asked) == 12


def test_predictions_of_unknown_settings_are_not_taken_over(
  tiny_data: Path, tmp_path: Path
) -> None:
  (tmp_path / "predictions.jsonl").write_text('{"id": "test-0", "text": "x", "error": ""}\n')
  with pytest.raises(EvalError, match=r"predictions without settings\.json"):
    run_lib.run(EasyVqa(tiny_data), Scripted(), tmp_path)


def test_a_damaged_line_is_named(tiny_data: Path, tmp_path: Path) -> None:
  run_lib.run(EasyVqa(tiny_data), Scripted(), tmp_path)
  path = tmp_path / "predictions.jsonl"
  lines = path.read_text().splitlines()
  lines[2] = lines[2][:20]
  path.write_text("\n".join(lines) + "\n")
  with pytest.raises(EvalError, match=r"predictions\.jsonl, line 3: expected an answer"):
    run_lib.run(EasyVqa(tiny_data), Scripted(), tmp_path)


def test_images_inside_the_data_are_named_by_their_hash(tiny_data: Path) -> None:
  picture = (tiny_data / "images" / "0.png").read_bytes()
  item = Item("x", "q", (picture,), "k", "yes")
  (name,) = predictions.image_names(item)
  assert name.startswith("sha256:")
  line = run_lib.record(EasyVqa(tiny_data), item, Answer("yes", ()))
  assert json.loads(json.dumps(line))["images"] == [name]
  assert line["verdict"] == {"score": 1.0}


def test_the_data_s_hash_changes_with_the_data(damaged: Path) -> None:
  before = EasyVqa(damaged).data_hash()
  (damaged / "test.json").write_text((damaged / "test.json").read_text() + " ")
  assert EasyVqa(damaged).data_hash() != before
