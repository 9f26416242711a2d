"""What an evaluation plans is what the engine runs: the same programs, shapes and bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jaxtyping
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.distributed.memory import device_bytes
from llava_sp_jax.infer import decode
from llava_sp_jax.infer.caches import FeatureCache, PrefixCache
from llava_sp_jax.infer.counts import Counts
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.layout import EngineLayout
from llava_sp_jax.infer.programs import Programs
from llava_sp_jax.infer.rows import Rows
from llava_sp_jax.models import build
from llava_sp_jax.plan import answers, traffic
from llava_sp_jax.plan.compile import EVAL, PROGRAMS
from tests.conftest import ConfigMaker

LENGTH = answers.SYSTEM + 2 * 42 + 20  # two images of 42 tokens, and a question


class Counted(Programs):
  """The engine's programs, which run, and are counted."""

  def __init__(self, *arguments: Any):
    self.calls: dict[Any, int] = {}
    super().__init__(*arguments)

  def _run(self, key: Any, *arguments: Any, **options: Any) -> Any:
    self.calls[key] = self.calls.get(key, 0) + 1
    return super()._run(key, *arguments, **options)


def config_of(tiny_config: ConfigMaker, **model: Any) -> config_lib.Config:
  return tiny_config(
    train={"batch_size": 3}, data={"row_length": LENGTH, "images_per_row": 2}, model=model
  )


def admitted(config: config_lib.Config, mesh: Any) -> Any:
  """With shapes in place of arrays, which annotations do not allow."""
  jaxtyping.config.update("jaxtyping_disable", True)
  try:
    return answers.admitted(config, mesh)
  finally:
    jaxtyping.config.update("jaxtyping_disable", False)


def test_each_program_runs_as_often_as_it_takes_to_fill_the_rows(tiny_config: ConfigMaker) -> None:
  config = config_of(tiny_config)
  mesh = mesh_lib.create(config_lib.MeshConfig(), devices=jax.devices()[:1])
  planned, rows, held = admitted(config, mesh)
  assert set(PROGRAMS[EVAL]) == set(answers.BESIDE) <= set(planned.traced)
  assert rows.count == 3
  assert {name: planned.runs(name) for name in answers.BESIDE} == {
    "encode": 6,
    "grow": 3,  # and once for the text that all share
    "admit": 1,
    "decode": 1,
  }
  text = config.model.language_model
  position = text.layers * 2 * text.kv_heads * text.head_dim * 4
  shared = -(-(LENGTH - 20) // 8) * 8  # positions, rounded up as in the engine's layout
  assert held["prefixes"] == 3 * shared * position
  assert not any(name.startswith("lora") for name in _names(planned._params))


def _names(params: Any) -> list[str]:
  return [str(path[-1].key) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


@pytest.mark.guard
@pytest.mark.parametrize("cache", ["float", "int8"])
def test_the_engine_runs_what_is_planned(tiny_config: ConfigMaker, cache: str) -> None:
  config = config_of(tiny_config, cache=cache)
  mesh = mesh_lib.create(config_lib.MeshConfig(), devices=jax.devices()[:1])
  planned, _, held = admitted(config, mesh)
  config = dataclasses.replace(config, model=answers.folded(config.model))
  params = jax.jit(lambda: build.initialize(config.model, jax.random.key(0)))()
  text, counts, layout = config.model.language_model, Counts(), EngineLayout()
  rule = decode.StopRule(answers.STOP_IDS, Generation().max_new_tokens, text.vocab_size)
  programs = Counted(config, params, decode.Sampling(rule), mesh, counts)
  features = FeatureCache(programs, answers.Blank.of(config), counts, layout.feature_bytes, 1)
  prefixes = PrefixCache(programs, features, counts, layout)
  real = Rows(programs, rule, Generation(), layout, prefixes, 3)
  real.admit([answers._ready(config, i) for i in range(3)], range(3))
  state = real._state
  real.decode(np.zeros(3, bool), 1, 4)

  calls = {key: count for key, count in programs.calls.items() if key != ("unstack",)}
  assert calls == planned._runs
  assert held["state"] == sum(x.nbytes for x in jax.tree.leaves(state))
  assert held["prefixes"] == sum(
    x.nbytes
    for i in range(3)
    for x in prefixes.of([(answers._ready(config, i).request, _shared(config, i))])[0] or ()
  )
  assert device_bytes(planned._params) == sum(x.nbytes for x in jax.tree.leaves(programs._params))


def _shared(config: config_lib.Config, number: int) -> Any:
  prompt = answers._ready(config, number).prompt
  assert prompt is not None
  return prompt.pieces[:-1]


def test_adapters_are_in_the_weights_unless_those_are_codes(tiny_config: ConfigMaker) -> None:
  assert answers.folded(config_of(tiny_config).model).lora.rank == 0
  assert answers.folded(config_of(tiny_config, quantize="int8").model).lora.rank == 8


@pytest.mark.parametrize(("quantize", "more"), [("none", False), ("int8", True)])
def test_a_step_reads_adapters_only_beside_codes(
  tiny_config: ConfigMaker, quantize: str, more: bool
) -> None:
  with_adapters = tiny_config(model={"lora": {"rank": 4}, "quantize": quantize}).model
  plain = tiny_config(model={"lora": {"rank": 0}, "quantize": quantize}).model
  assert (traffic.of(with_adapters).weights > traffic.of(plain).weights) == more


def test_a_prompt_has_room_for_a_question(tiny_config: ConfigMaker) -> None:
  config = config_of(tiny_config)
  short = config_lib.override(config, {"config.data.row_length": str(answers.SYSTEM)})
  mesh = mesh_lib.create(config_lib.MeshConfig(), devices=jax.devices()[:1])
  with pytest.raises(config_lib.ConfigError, match="leave no room for a question; give more than"):
    admitted(short, mesh)
