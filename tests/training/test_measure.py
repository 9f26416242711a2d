"""Sums over a batch against slow and obvious loops."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.data import anyres, pipeline
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.models import build
from llava_sp_jax.models.layers import causal_mask
from llava_sp_jax.training import measure, step
from tests.conftest import ConfigMaker


def packed(rows: int = 6, length: int = 40, seed: int = 0) -> dict[str, np.ndarray]:
  """Rows of samples of random lengths, some with images anywhere in them, then padding."""
  rng = np.random.default_rng(seed)
  batch = {name: np.zeros((rows, length), np.int32) for name in ("segments", "positions")}
  batch["slots"] = np.full((rows, length), -1, np.int32)
  batch["weights"] = rng.integers(0, 2, (rows, length)).astype(np.float32)
  for row in range(rows):
    at, sample = 0, 1
    while (size := int(rng.integers(1, 12))) + at <= length - 3:
      mine = slice(at, at + size)
      batch["segments"][row, mine] = sample * BRANCHES
      batch["positions"][row, mine] = np.arange(size)
      if rng.random() < 0.5:
        start = at + int(rng.integers(0, size))
        batch["slots"][row, start : at + size] = np.arange(at + size - start)
      at, sample = at + size, sample + 1
    batch["weights"][row, at:] = 0
  return batch


def naive_about_image(batch: dict[str, np.ndarray]) -> np.ndarray:
  result = np.zeros(batch["segments"].shape, np.float32)
  sample = batch["segments"] // BRANCHES
  for row, column in np.ndindex(result.shape):
    mine = sample[row] == sample[row, column]
    result[row, column] = (batch["slots"][row][mine] >= 0).any()
  return result


@pytest.mark.parametrize("seed", range(5))
def test_which_positions_belong_to_a_sample_with_an_image(seed: int) -> None:
  batch = packed(seed=seed)
  wanted = naive_about_image(batch)
  assert 0 < wanted.mean() < 1
  np.testing.assert_array_equal(measure.about_image(batch), wanted)


def test_a_row_of_one_position() -> None:
  batch = {"segments": jnp.full((2, 1), BRANCHES), "slots": jnp.asarray([[0], [-1]])}
  np.testing.assert_array_equal(measure.about_image(batch), [[1.0], [0.0]])


def test_pairs_are_those_of_the_mask() -> None:
  batch = packed()
  index = np.broadcast_to(np.arange(batch["segments"].shape[1]), batch["segments"].shape)
  mask = causal_mask(index, batch["segments"], index, batch["segments"])
  used = batch["segments"] > 0
  wanted = (np.asarray(mask).reshape(len(used), *mask.shape[-2:]) & used[:, :, None]).sum()
  sums = measure.batch_sums(batch, measure.about_image(batch))
  assert float(sums["pairs"]) == wanted
  assert float(sums["positions"]) == used.sum()
  assert float(sums["image_positions"]) == (batch["slots"] >= 0).sum()


@pytest.mark.slow
def test_loss_by_modality_is_the_loss_of_those_samples(tiny_config: ConfigMaker) -> None:
  """Against the same model on the same rows, where only one kind of sample has weights."""
  config = tiny_config()
  module = build.model(config.model)
  params = build.initialize(config.model, jax.random.key(0))
  tile = anyres.Tile(*build.tile_shape(config.model))
  batch = next(pipeline.make(config.data, Tokenizer(config.data.tokenizer), tile, 4, 0))
  batch["slots"][1::2] = -1  # every other row is now about text
  image = measure.about_image(batch)
  np.testing.assert_array_equal(image[:, 0], [1, 0, 1, 0])

  def sums(weights: Any) -> Any:
    return step.loss_and_counts(module, params, batch | {"weights": weights}, chunk=64)

  mean, both = sums(batch["weights"])
  metrics = measure.report(both, {"projector/fc1/kernel": jnp.ones(3)})
  assert float(metrics["loss"]) == pytest.approx(float(mean), rel=1e-6)
  for name, mask in (("loss_image", image), ("loss_text", 1 - image)):
    alone, _ = sums(batch["weights"] * mask)
    assert float(metrics[name]) == pytest.approx(float(alone), rel=1e-5)
  assert metrics["loss_image"] != metrics["loss_text"]


def test_norms_by_part_add_up() -> None:
  grads = {
    "projector/fc1/kernel": jnp.full((2, 2), 3.0),
    "projector/pool_0/kernel": jnp.full(4, 2.0),
    "language_model/layers/q_proj/lora_a": jnp.zeros(5),
    "language_model/layers/q_proj/lora_b": jnp.full(1, 5.0),
  }
  sums = dict.fromkeys(
    (
      "loss",
      "right",
      "image_loss",
      "count",
      "image_count",
      "positions",
      "pairs",
      "image_positions",
    ),
    jnp.zeros(()),
  )
  metrics = measure.report(sums, grads)
  assert measure.norms(metrics["grad_squares"], grads) == {
    "lora": 5.0,
    "projector": 6.0,
    "spatial": 4.0,
  }
  assert float(metrics["grad_norm"]) == pytest.approx((25 + 36 + 16) ** 0.5)
