"""The adapter under a stand-in of lmms-eval: its base class and `Instance`, with the same fields."""

from __future__ import annotations

import abc
import collections
import dataclasses
import importlib
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from PIL import Image

from llava_sp_jax.eval import lmms
from llava_sp_jax.infer.engine import Engine, Request
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.likelihood import Likelihood
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.tasks.task import EvalError
from tests.conftest import REPOSITORY


class CacheHook:
  def __init__(self) -> None:
    self.seen: list[tuple[str, Any, Any]] = []

  def add_partial(self, attr: str, req: Any, res: Any) -> None:
    self.seen.append((attr, req, res))


class Base(abc.ABC):
  """What `lmms_eval.api.model.lmms` gives to a model and asks of it."""

  is_simple = True

  def __init__(self) -> None:
    self._rank, self._world_size = 0, 1
    self.cache_hook = CacheHook()
    self.task_dict: dict[str, Any] = {}
    self.cache_dict: dict[str, Any] = collections.defaultdict(dict)

  @abc.abstractmethod
  def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]: ...
  @abc.abstractmethod
  def generate_until(self, requests: list[Instance]) -> list[str]: ...
  @abc.abstractmethod
  def generate_until_multi_round(self, requests: list[Instance]) -> list[str]: ...


@dataclasses.dataclass
class Instance:
  """`lmms_eval.api.instance.Instance`."""

  request_type: Literal["loglikelihood", "generate_until", "generate_until_multi_round"]
  arguments: tuple
  idx: int
  metadata: dict[str, Any]

  @property
  def args(self) -> tuple:
    return self.arguments


@dataclasses.dataclass(frozen=True)
class ModelManifest:
  model_id: str
  simple_class_path: str | None = None
  chat_class_path: str | None = None
  aliases: tuple[str, ...] = ()


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
  """The adapter as it is imported where lmms-eval is installed."""
  parts = {
    "lmms_eval": {},
    "lmms_eval.api": {},
    "lmms_eval.api.model": {"lmms": Base},
    "lmms_eval.models": {},
    "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
  }
  for name, content in parts.items():
    module = types.ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)
  yield importlib.reload(lmms)
  monkeypatch.undo()
  importlib.reload(lmms)


@pytest.fixture
def model(harness: Any, loaded: Pretrained, tiny_data: Path) -> Any:
  result = harness.LlavaSp(pretrained=loaded, batch_size="2", device="cpu")
  documents = [{"image": tiny_data / "images" / f"{i}.png", "answer": "blue"} for i in range(4)]
  result.task_dict = {"colours": {"test": documents}}
  return result


def visuals(document: dict[str, Any]) -> list[Image.Image]:
  with Image.open(document["image"]) as picture:
    return [picture.convert("RGB")]


def instance(
  kind: Any, index: int, question: str, second: Any, to_visual: Callable = visuals
) -> Instance:
  arguments = (question, second, to_visual, index, "colours", "test")
  return Instance(kind, arguments, 0, {"task": "colours", "doc_id": index, "repeats": 1})


def test_the_harness_finds_a_whole_model(harness: Any) -> None:
  found = harness.manifest()
  module, _, name = found.simple_class_path.rpartition(".")
  cls = getattr(importlib.import_module(module), name)
  assert issubclass(cls, Base)
  assert not cls.__abstractmethods__
  assert cls.is_simple
  assert found.model_id == "llava_sp_jax"
  project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
  assert project["entry-points"]["lmms_eval.models"] == {found.model_id: f"{module}:manifest"}


@pytest.mark.guard
def test_answers_are_the_engine_s_in_order(model: Any, engine: Engine, tiny_data: Path) -> None:
  """Requests with other settings in between are grouped, and come back in their places."""
  longer, shorter = {"max_new_tokens": 4}, {"max_new_tokens": 2, "temperature": 0}
  asked = [
    instance("generate_until", i, "what is it?", dict((longer, shorter)[i % 2]))
    for i in (2, 0, 3, 1)
  ]
  none = instance("generate_until", 0, "what is it?", dict(longer), lambda _: [])
  texts = model.generate_until([*asked, none])
  decode = engine.pretrained.tokenizer.decode
  for request, text in zip(asked, texts, strict=False):
    path = tiny_data / "images" / f"{request.args[3]}.png"
    (answer,) = engine.answer([Request("what is it?", (path,))])
    assert text == decode(answer.ids[: request.args[1]["max_new_tokens"]]).strip()
  (answer,) = engine.answer([Request("what is it?")])
  assert texts[-1] == answer.text
  assert {name for name, _, _ in model.cache_hook.seen} == {"generate_until"}
  assert sorted(text for _, _, text in model.cache_hook.seen) == sorted(texts)
  assert asked[0].args[1] == longer, "the task's own dictionary is not changed"


def test_several_images_stand_in_front_of_the_question(model: Any) -> None:
  (request,) = model._requests(
    [instance("generate_until", 0, "which?", {}, lambda d: [*visuals(d), *visuals(d)])]
  )
  assert request.question == "<image> <image>\nwhich?"
  (request,) = model._requests([instance("generate_until", 0, "<image>\nwhich?", {})])
  assert request.question == "<image>\nwhich?"


def test_loglikelihoods_are_those_of_the_model(
  model: Any, loaded: Pretrained, tiny_data: Path
) -> None:
  """Targets as texts (choices, behind a blank) and as functions of the document."""
  asked = [
    instance("loglikelihood", 1, "what is it?", " red"),
    instance("loglikelihood", 1, "what is it?", lambda d: d["answer"]),
  ]
  request = Request("what is it?", (tiny_data / "images" / "1.png",))
  expected = list(Likelihood(loaded, 1)([(request, "red"), (request, "blue")]))
  found = model.loglikelihood(asked)
  for (total, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
    assert total == pytest.approx(wanted, abs=1e-4)
    assert greedy == wanted_greedy
  assert found[0][0] != pytest.approx(found[1][0], abs=1e-2)


def test_what_it_cannot_do_is_refused(model: Any, harness: Any, loaded: Pretrained) -> None:
  with pytest.raises(EvalError, match="several rounds"):
    model.generate_until_multi_round([])
  with pytest.raises(EvalError, match="unknown repetition_penalty; known: max_new_tokens"):
    model.generate_until([instance("generate_until", 0, "q", {"repetition_penalty": 2.0})])
  with pytest.raises(EvalError, match="--model_args: unknown conv_template"):
    harness.LlavaSp(pretrained=loaded, conv_template="v1")
  with pytest.raises(EvalError, match="--batch_size: expected a number from 1, found 'auto'"):
    harness.LlavaSp(pretrained=loaded, batch_size="auto")


def test_a_request_without_an_answer_is_not_scored(model: Any) -> None:
  asked = instance("generate_until", 2, "<image> <image> q", {"max_new_tokens": 2})
  with pytest.raises(EvalError, match=r"colours, test, document 2: .*2 <image>"):
    model.generate_until([asked])


def test_without_lmms_eval_it_says_how_to_get_it(loaded: Pretrained) -> None:
  module = importlib.reload(lmms)
  assert module.Base is object
  with pytest.raises(EvalError, match="pip install lmms-eval"):
    module.LlavaSp(pretrained=loaded)


@pytest.mark.parametrize(
  ("arguments", "expected"),
  [
    ({}, Generation(max_new_tokens=1024)),
    ({"temperature": 0.2, "top_p": 0.9, "do_sample": True, "max_new_tokens": 16},
     Generation(max_new_tokens=16, temperature=0.2, top_p=0.9)),
    ({"temperature": 0, "top_p": 1.0, "num_beams": 1, "until": "###", "image_aspect_ratio": "pad"},
     Generation(max_new_tokens=1024, stop=("###",))),
    ({"top_p": None, "num_beams": 3, "do_sample": False, "temperature": 0.7},
     Generation(max_new_tokens=1024, num_beams=3)),
  ],
)  # fmt: skip
def test_settings_of_a_task(arguments: dict[str, Any], expected: Generation) -> None:
  assert lmms.generation(arguments) == expected
