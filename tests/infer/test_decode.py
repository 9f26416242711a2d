"""One choice of a token by hand: ends, limits, margins; and what engines are built with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.infer import row_settings
from llava_sp_jax.infer.decode import Sampling, StopRule
from llava_sp_jax.infer.engine import Engine, Generation, Request
from llava_sp_jax.infer.pretrained import Pretrained, padded_from
from llava_sp_jax.infer.verify import BOUNDS, Comparison
from tests.conftest import ConfigMaker
from tests.infer.tiny import random_model

WORDS, ENDS, LIMIT = 9, (4, 7), 3


def logits(token: int, lead: float) -> np.ndarray:
  """Rows in which `token` leads by `lead`."""
  found = np.zeros(WORDS, np.float32)
  found[token], found[(token + 1) % WORDS] = 2.0 + lead, 2.0
  return found


# What four rows choose in turn, with by how much; an end is one of two tokens, the limit is three.
CHOICES = (
  ((1, 0.5), (2, 0.25), (3, 1.0), (4, 9.0)),  # to the limit: its fourth choice is none
  ((4, 0.5), (1, 0.1), (1, 0.1), (1, 0.1)),  # nothing but an end
  ((1, 1.0), (7, 0.5), (1, 0.1), (1, 0.1)),  # the other end
  ((5, 1.0), (5, 2.0), (4, 3.0), (1, 0.1)),
)
WANTED = (((1, 2, 3), 0.25), ((), 0.5), ((1,), 0.5), ((5, 5), 1.0))


def test_answers_end_at_either_end_or_the_limit() -> None:
  strategy = Sampling(StopRule(ENDS, LIMIT, WORDS))
  asked = [Generation(max_new_tokens=LIMIT)] * 4
  settings = jax.tree.map(jnp.asarray, row_settings.of(asked, range(4), [None] * 4, ENDS, WORDS))
  rows, done = None, []
  for turn in range(4):
    each = jnp.asarray(np.stack([logits(*row[turn]) for row in CHOICES]))
    if rows is None:
      rows = strategy.first(each, settings)
    else:
      rows, parents = strategy.choose(rows, each, strategy.modes(rows))
      assert parents is None
    done.append(rows.done.tolist())
  assert done == [[False, True, False, False], [False, True, True, False], [True] * 4, [True] * 4]
  assert rows is not None
  for row, (ids, margin) in enumerate(WANTED):
    assert tuple(rows.ids[row, : int(rows.made[row])].tolist()) == ids
    assert float(rows.margin[row]) == pytest.approx(margin)
  assert rows.settings.number.tolist() == [0, 1, 2, 3]
  free = strategy.empty(2)
  assert free.done.tolist() == [True, True]
  assert np.isinf(free.margin).all()


@pytest.fixture(scope="module")
def model(tiny_config: ConfigMaker) -> Pretrained:
  return random_model(tiny_config("finetune", "none"))


def test_an_engine_is_built_with_all_that_was_asked_for(model: Pretrained) -> None:
  asked = Generation(max_new_tokens=7, temperature=0.5, top_k=3, top_p=0.9, seed=4)
  engine = Engine(model, 2, asked)
  rule = engine._programs._strategy.rule
  vocabulary = model.config.model.language_model.vocab_size
  assert rule == StopRule(engine._prompts.stop_ids, 7, vocabulary, 1, padded_from(model))
  assert Engine(model, 2, Generation(num_beams=3))._programs._strategy.rule.beams == 3


def test_prefixes_are_shared_unless_positions_depend_on_the_whole_prompt(
  model: Pretrained, tiny_data: Path
) -> None:
  config = model.config
  scaling = config_lib.RopeScaling(kind="dynamic", factor=2.0, original_length=64)
  text = dataclasses.replace(config.model.language_model, rope_scaling=scaling)
  dynamic = dataclasses.replace(
    config, model=dataclasses.replace(config.model, language_model=text)
  )
  request = Request("what is it?", (tiny_data / "images" / "0.png",))
  pieces = [
    len(Engine(dataclasses.replace(model, config=c))._prompts(request).pieces)
    for c in (config, dynamic)
  ]
  assert pieces[0] > pieces[1] == 1


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_merge_is_verified_within_the_bound_of_its_dtype(dtype: str) -> None:
  for factor, within in ((0.99, True), (1.01, False)):
    assert Comparison(BOUNDS[dtype] * factor, 1.0, dtype).within_bounds == within
  assert BOUNDS["float32"] < BOUNDS["float16"] < BOUNDS["bfloat16"] < 0.2
