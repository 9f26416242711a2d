"""`model.matmul_precision` in what is handed to the compiler: every product of every program."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import runs
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.eval import identity
from llava_sp_jax.infer import verify
from llava_sp_jax.infer.engine import Engine, Generation, Request
from llava_sp_jax.infer.likelihood import Likelihood
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.models import attention, build
from llava_sp_jax.plan import lower
from llava_sp_jax.training.validation import Validator
from tests.conftest import WIDE, ConfigMaker

BFLOAT16 = {"dtype": "bfloat16", "frozen_dtype": "bfloat16"}
OWN = {"matmul_precision": "default"}
jit = jax.jit


def asked(text: str) -> list[set[str]]:
  """What each product of a lowered program asks for."""
  lines = [x for x in text.splitlines() if re.search(r"stablehlo\.(dot_general|convolution)", x)]
  return [set(re.findall(r"\b(DEFAULT|HIGH|HIGHEST)\b", line)) for line in lines]


class Program:
  """Stands in for `jax.jit`: keeps the lowered text and computes ones where there are products."""

  def __init__(self, texts: list[tuple[str, str]], run: Callable[..., Any], **options: Any):
    self._texts, self._jitted = texts, jit(run, **options)
    self._name = getattr(run, "__qualname__", "")

  def __call__(self, *arguments: Any) -> Any:
    return self.lower(*arguments).compile()(*arguments)

  def lower(self, *arguments: Any) -> Any:
    self._lowered = self._jitted.lower(*arguments)
    text = self._lowered.as_text()
    if not asked(text):
      return self._lowered
    self._texts.append((self._name, text))
    return self

  def compile(self) -> Callable[..., Any]:
    return lambda *_: jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), self._lowered.out_info)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
  """Names and texts of all programs with products that are compiled from here on."""
  found: list[tuple[str, str]] = []
  monkeypatch.setattr(jax, "jit", lambda run, **options: Program(found, run, **options))
  return found


def untrained(config: config_lib.Config) -> Pretrained:
  params = jax.tree.map(
    lambda s: np.zeros(s.shape, config.model.dtype), build.abstract(config.model)
  )
  return Pretrained(config, params, Tokenizer(config.data.tokenizer))


REMAT = {"remat": "projections"}
SLICES = {"batch_size": 16, "accumulate": 2, "loss_chunk": 64}
STEPS: dict[str, tuple[str, str, dict[str, Any], str]] = {
  "adapters, spatial kernels, a loss in slices":
    ("finetune", "cropping", {"model": REMAT, "train": SLICES}, "HIGHEST"),
  "all that can learn": ("pretrain_all", "pooling", {"model": REMAT}, "HIGHEST"),
  "a transformer and quantised kernels":
    ("finetune", "cropping_transformer", {"model": {**WIDE, **REMAT, "quantize": "nf4", "projector": {"scales": (3,)}}}, "HIGHEST"),
  "bfloat16": ("finetune", "cropping", {"model": {**BFLOAT16, **REMAT}}, "DEFAULT"),
  "three passes": ("finetune", "none", {"model": {"matmul_precision": "high"}}, "HIGH"),
  "the platform's own": ("finetune", "cropping", {"model": {**OWN, **REMAT}}, "DEFAULT"),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_every_product_of_the_train_step(tiny_config: ConfigMaker, name: str) -> None:
  """Forward, backward and recomputed, on a mesh, where details are a convolution."""
  stage, variant, changes, expected = STEPS[name]
  config = tiny_config(stage, variant, **changes)
  mesh = mesh_lib.create(config.mesh, config.train.batch_size, config.train.accumulate)
  with jax.set_mesh(mesh):
    text = lower.train_step(config, mesh).lower().as_text()
  found = asked(text)
  assert len(found) > 50
  assert found == [{expected}] * len(found)
  assert ("stablehlo.convolution" in text) == (variant == "cropping")


def ask_engine(config: config_lib.Config, folder: Path, **generation: Any) -> None:
  engine = Engine(untrained(config), 2, Generation(max_new_tokens=2, **generation))
  list(engine.answer([Request("what is it?", (folder / "images" / "0.png",))]))


def greedy(config: config_lib.Config, folder: Path) -> None:
  ask_engine(config, folder)


def beams(config: config_lib.Config, folder: Path) -> None:
  ask_engine(config, folder, num_beams=2)


def likelihood(config: config_lib.Config, folder: Path) -> None:
  list(
    Likelihood(untrained(config), 1)([(Request("is it?", (folder / "images" / "0.png",)), "red")])
  )


def validation(config: config_lib.Config, folder: Path) -> None:
  train = dataclasses.replace(config.train, validate_every=1, validate_batches=1)
  data = dataclasses.replace(config.data, validation_path=config.data.path)
  config = dataclasses.replace(config, train=train, data=data)
  mesh = mesh_lib.create(config.mesh, config.train.batch_size)
  with jax.set_mesh(mesh):
    validator = Validator(config, build.model(config.model), Tokenizer(config.data.tokenizer), mesh)
    flat = flatten_dict(untrained(config).params, sep="/")
    validator(SimpleNamespace(trainable={}, frozen=flat))  # type: ignore[arg-type]


def verified(config: config_lib.Config, folder: Path) -> None:
  """As `merge --verify` compares: a Source is only asked for these two."""
  shapes = flatten_dict(build.abstract(config.model), sep="/")
  leaves = {p: SimpleNamespace(read=lambda s=s: np.zeros(s.shape)) for p, s in shapes.items()}
  verify._logits(SimpleNamespace(config=config, leaves=leaves))  # type: ignore[arg-type]


ENGINE = ("infer_encode", "infer_admit", "infer_decode")
# What runs, and parts of the names of the programs that it must have compiled.
PROGRAMS: dict[str, tuple[Callable[[config_lib.Config, Path], None], tuple[str, ...]]] = {
  "engine": (greedy, ENGINE),
  "engine, beams": (beams, ENGINE),
  "likelihood": (likelihood, ("infer_score",)),
  "validation": (validation, ("Validator.__init__.<locals>.sums",)),
  "verify": (verified, ("_logits.<locals>.run",)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_product_of_the_other_programs(
  tiny_config: ConfigMaker, tiny_data: Path, texts: list[tuple[str, str]], name: str
) -> None:
  compute, programs = PROGRAMS[name]
  compute(tiny_config("finetune", "cropping"), tiny_data)
  for program in programs:
    assert any(program in key for key, _ in texts)
  for key, text in texts:
    assert asked(text) == [{"HIGHEST"}] * len(asked(text)), key


def test_answers_in_bfloat16_ask_for_nothing(
  tiny_config: ConfigMaker, tiny_data: Path, texts: list[tuple[str, str]]
) -> None:
  greedy(tiny_config("finetune", "pooling", model=BFLOAT16), tiny_data)
  assert texts
  for key, text in texts:
    assert asked(text) == [{"DEFAULT"}] * len(asked(text)), key


def test_an_unknown_precision_is_refused(tiny_config: ConfigMaker) -> None:
  model = tiny_config(model={"matmul_precision": "exact"}).model
  known = "auto, default, high, highest"
  with pytest.raises(config_lib.ConfigError, match=f"model.matmul_precision.*'exact'.*{known}"):
    build.model(model)


def test_a_config_that_was_saved_without_it_opens(tiny_config: ConfigMaker) -> None:
  """And goes on: on a CPU it trained with what is asked for now."""
  config = tiny_config()
  values = config_lib.to_dict(config)
  del values["model"]["matmul_precision"]
  assert config_lib.from_json(json.dumps(values)) == config


def test_a_run_goes_on_with_its_own_only(
  tiny_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  runs.write_config(tmp_path, tiny_config())
  monkeypatch.setattr(runs, "steps", lambda folder: [3])
  with pytest.raises(CheckpointError, match="matmul_precision: 'default' here, 'auto'"):
    runs.check_config(tmp_path, tiny_config(model=OWN))


def test_a_score_keeps_it_among_its_settings(tiny_config: ConfigMaker) -> None:
  """So answers that were made with another one are refused, as every other setting is."""
  for changes, expected in (({}, "auto"), (OWN, "default")):
    reads = identity.reads(untrained(tiny_config(model=changes)))
    assert reads["model"]["matmul_precision"] == expected


@pytest.mark.parametrize("name", ["flash", "splash"])
def test_no_kernel_is_taken_where_a_precision_is_asked_for(name: str) -> None:
  """Its gradients are traced when the forward pass is over, so they would not have it."""
  spec = attention.AttentionChoice("auto", "tpu", branches=False)
  case = attention.Case(spec, 512, 64, jnp.dtype(jnp.float32), False, (1, 4, 4))
  asking = dataclasses.replace(case, spec=dataclasses.replace(spec, precision="highest"))
  assert (attention.choose(case), attention.choose(asking)) == ("flash", "xla")
  named = dataclasses.replace(asking, spec=dataclasses.replace(asking.spec, name=name))
  with pytest.raises(ValueError, match="gradients are not made with matmul_precision 'highest'"):
    attention.choose(named)
