"""`import llava_sp_jax as llava`: light to import, and its model says what the commands say."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import llava_sp_jax as llava
from llava_sp_jax.data import anyres
from llava_sp_jax.infer.engine import Engine
from llava_sp_jax.infer.likelihood import Likelihood
from llava_sp_jax.models import build
from tests.conftest import REPOSITORY, ConfigMaker
from tests.infer import tiny

QUESTION = "what colour is it?"
README_RUN = "runs/easy_vqa/pooling-0/finetune"
README_PICTURE = "data/easy_vqa/images/test/0.png"
SHORT = llava.Generation(max_new_tokens=6)


@pytest.fixture(scope="module")
def model(tiny_config: ConfigMaker) -> llava.VisionLanguageModel:
  return llava.VisionLanguageModel(tiny.random_model(tiny_config("finetune")), batch_size=4)


@pytest.fixture
def picture(tiny_data: Path) -> Path:
  return tiny_data / "images" / "3.png"


def test_importing_it_imports_nothing_else() -> None:
  code = (
    "import sys; import llava_sp_jax as llava; names = dir(llava); "
    "print([n for n in ('jax', 'numpy', 'flax', 'transformers') if n in sys.modules]); "
    "llava.Generation; print('jax' in sys.modules); print(set(llava.__all__) <= set(names))"
  )
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert done.stdout.splitlines() == ["[]", "False", "True"]


@pytest.mark.parametrize("name", llava.__all__)
def test_every_public_name_is_there(name: str) -> None:
  assert getattr(llava, name).__doc__


def signatures(name: str) -> dict[str, Any]:
  """Functions of a public name: itself, or the class's own fields, constructor and public methods."""
  value = getattr(llava, name)
  if not inspect.isclass(value):
    return {name: value}
  found = {name: value}
  for key, member in vars(value).items():
    function = member.fget if isinstance(member, property) else member
    function = inspect.unwrap(getattr(function, "__func__", function))
    own = inspect.isfunction(function) and function.__module__.startswith(llava.__name__)
    if own and (not key.startswith("_") or key in ("__init__", "__call__")):
      found[f"{name}.{key}"] = function
  return found


def types_within(hint: Any) -> Iterator[Any]:
  """A type and the types it is made of: those of `dict[str, list[int]]` are itself, str, list, int."""
  yield hint
  for part in hint if isinstance(hint, list) else typing.get_args(hint):
    yield from types_within(part)


def records(found: dict[str, Any]) -> dict[str, Any]:
  """The package's dataclasses that signatures name: what a user gets, or has to give."""
  hints = [hint for value in found.values() for hint in typing.get_type_hints(value).values()]
  types = {part for hint in hints for part in types_within(hint) if inspect.isclass(part)}
  own = [kind for kind in types if kind.__module__.startswith(llava.__name__)]
  return {kind.__name__: kind for kind in own if dataclasses.is_dataclass(kind)}


@pytest.mark.parametrize("name", llava.__all__)
def test_public_signatures_have_types(name: str) -> None:
  """No parameter, result or field without a type, or with `Any` somewhere in it."""
  found = signatures(name)
  for place, value in (records(found) | found).items():
    hints = typing.get_type_hints(value)
    loose = {key for key, hint in hints.items() if Any in types_within(hint)}
    assert loose == ({"opt_state"} if place == "TrainState" else set()), place  # optax's own
    if inspect.isfunction(value):
      named = [key for key in inspect.signature(value).parameters if key != "self"]
      assert not {*named, "return"} - {*hints, *(["return"] * place.endswith("__init__"))}, place


def test_the_readme_runs(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
  """README's lines, on a folder of the original's format in place of the demo's run."""
  (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
  for written, there in (
    (README_RUN, REPOSITORY / "tests/golden/pooling/llava-lora"),
    (README_PICTURE, picture),
  ):
    assert code.count(written) == 1
    code = code.replace(written, str(there))
  exec(code, {})
  *_, scored, shape = capsys.readouterr().out.splitlines()
  assert re.fullmatch(r"\(-\d+\.\d+, (True|False)\)", scored)
  assert shape == "(582, 48)"  # six spatial tokens, 24 x 24 patches


def test_an_unknown_name_is_an_error() -> None:
  with pytest.raises(AttributeError, match="'llava_sp_jax' has no attribute 'lode'"):
    _ = llava.lode  # type: ignore[attr-defined]


def test_answers_are_the_engines(model: llava.VisionLanguageModel, picture: Path) -> None:
  asked = [llava.Request(QUESTION, (picture,)), llava.Request("is it red?")]
  wanted = [a.text for a in Engine(model.engine(SHORT).pretrained, 4, SHORT).answer(asked)]
  assert [a.text for a in model.answers(asked, SHORT)] == wanted
  assert model.answer(QUESTION, [picture], generation=SHORT) == wanted[0]
  assert "".join(model.stream(QUESTION, [picture], generation=SHORT)) == wanted[0]
  assert model.engine(SHORT) is model.engine(SHORT)


def test_a_question_without_an_answer_is_an_error(
  model: llava.VisionLanguageModel, tmp_path: Path
) -> None:
  missing = tmp_path / "gone.png"
  for ask in (
    lambda: model.answer(QUESTION, [missing], generation=SHORT),
    lambda: model.loglikelihood(QUESTION, "red", [missing]),
    lambda: model.encode_image(missing),
  ):
    with pytest.raises(ValueError, match=r"gone\.png"):
      ask()


def test_loglikelihood_is_that_of_the_batch(
  model: llava.VisionLanguageModel, picture: Path
) -> None:
  pretrained = model.engine(SHORT).pretrained
  asked = (llava.Request(QUESTION, (picture,)), "blue")
  ((total, greedy),) = Likelihood(pretrained)([asked])
  found = model.loglikelihood(QUESTION, "blue", [picture])
  assert found == (pytest.approx(total, rel=1e-5), greedy)  # sums of another batch size


def test_encode_image_is_what_training_reads(
  model: llava.VisionLanguageModel, picture: Path
) -> None:
  config, params = model.config, model.engine(SHORT).pretrained.params
  with Image.open(picture) as opened:
    tiles = anyres.Reader(config.data, anyres.Tile(*build.tile_shape(config.model)))(opened).tiles
  module = build.model(config.model)
  wanted = module.apply({"params": params}, tiles[None], method="encode_image")[0]
  found = model.encode_image(picture)
  assert found.shape == (build.image_token_count(config.model), config.model.language_model.width)
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("shape", [(1, 20, 24, 8), (1, 576, 8), (1, 0, 0, 8)])
def test_a_projector_takes_square_grids_alone(shape: tuple[int, ...]) -> None:
  with pytest.raises(ValueError, match=r"expected features \[B, G, G, C\] of a square grid"):
    llava.Projector("pooling", 4, 8).init({}, np.zeros(shape, np.float32))


def test_a_projector_names_the_rows_that_there_are() -> None:
  with pytest.raises(ValueError, match="variant 'poling': expected one of none, pooling, cropping"):
    llava.Projector("poling", 4, 8).init({}, np.zeros((1, 6, 6, 8), np.float32))
