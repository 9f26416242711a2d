"""Validation against the same samples scored one by one."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import anyres, pipeline, validation_split
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.models import build
from llava_sp_jax.training import setup, step
from llava_sp_jax.training.state import TrainState, join
from llava_sp_jax.training.validation import Validator
from tests.conftest import ConfigMaker
from tests.distributed.meshes import mesh_of

ROWS = 2


@pytest.fixture(scope="module")
def config(tiny_config: ConfigMaker) -> config_lib.Config:
  """Half of the adapters' input would be dropped, were this training."""
  return tiny_config(
    "finetune",
    "none",
    model={"lora": {"dropout": 0.5}},
    data={"validation_fraction": 0.6, "turns_per_row": 1, "augment": "mirror_shift"},
    train={"batch_size": ROWS, "steps": 9, "validate_every": 4, "validate_batches": 9},
  )


def validator(config: config_lib.Config) -> Validator:
  module = build.model(config.model)
  return Validator(config, module, Tokenizer(config.data.tokenizer), mesh_of((1, 1, 1)))


@pytest.fixture(scope="module")
def state(config: config_lib.Config) -> TrainState:
  mesh = mesh_of((1, 1, 1))
  with jax.set_mesh(mesh):
    made, _, _ = setup.initial_state(config, mesh)
  noise = np.random.default_rng(0)
  return made.replace(
    trainable={
      p: x + 0.1 * noise.normal(size=x.shape).astype(np.float32) for p, x in made.trainable.items()
    }
  )


def one_by_one(config: config_lib.Config, state: TrainState, batches: int) -> dict[str, float]:
  """Means over the supervised tokens of the first `batches` of the validation split, row by row."""
  tile = anyres.Tile(*build.tile_shape(config.model))
  rows = pipeline.make(
    config.data,
    Tokenizer(config.data.tokenizer),
    tile,
    1,
    config.train.seed,
    split=validation_split.VALIDATION,
  )
  module, params = build.model(config.model), join(state.trainable, state.frozen)
  run: Any = jax.jit(lambda batch: step.loss_and_counts(module, params, batch, 512)[1])
  total = dict.fromkeys(("loss", "right", "count"), 0.0)
  for _ in range(batches * ROWS):
    batch = next(rows)
    batch.pop(pipeline.SAMPLES)
    found = run(batch)
    total = {name: total[name] + float(found[name]) for name in total}
  count = total["count"]
  return {"val_loss": total["loss"] / count, "val_token_accuracy": total["right"] / count}


def test_every_validation_sample_counts_once_each_time(
  config: config_lib.Config, state: TrainState
) -> None:
  """All whole batches of them, the same ones again; no dropout, no other turns or shifts."""
  held = len(validation_split.samples(config.data, validation_split.VALIDATION, 12))
  assert held // ROWS > 1
  made = validator(config)
  first = made(state)
  assert first == pytest.approx(one_by_one(config, state, held // ROWS), rel=1e-4)
  assert made(state) == first
  limited = dataclasses.replace(config.train, validate_batches=1)
  one = validator(dataclasses.replace(config, train=limited))
  assert one(state)["val_loss"] != pytest.approx(first["val_loss"], rel=1e-4)


def test_when_it_is_due(config: config_lib.Config) -> None:
  made = validator(config)
  assert [n for n in range(1, 10) if made.due(n)] == [4, 8, 9]
  never = dataclasses.replace(config.train, validate_every=0)
  assert not any(validator(dataclasses.replace(config, train=never)).due(n) for n in range(1, 10))
