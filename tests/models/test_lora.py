"""Adapters: nothing at first, the same as the merged kernel later, and dropout only when asked for."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax.models.lora import Lora, LoraDense

X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


@pytest.fixture
def params() -> dict:
  return LoraDense(5, rank=2, alpha=4.0).init(jax.random.key(0), X)["params"]


def test_fresh_adapters_change_nothing(params: dict) -> None:
  ours = LoraDense(5, rank=2, alpha=4.0).apply({"params": params}, X)
  base = {k: params[k] for k in ("kernel", "bias")}
  np.testing.assert_array_equal(ours, nn.Dense(5).apply({"params": base}, X))
  assert not params["lora_b"].any()
  bound = 1 / np.sqrt(6)  # PEFT's kaiming_uniform(a=sqrt(5))
  assert 0 < np.abs(params["lora_a"]).max() <= bound


def test_merged_equals_unmerged(params: dict) -> None:
  params = {
    **params,
    "lora_b": jnp.asarray(np.random.default_rng(1).normal(size=(2, 5)), "float32"),
  }
  unmerged = LoraDense(5, rank=2, alpha=4.0).apply({"params": params}, X)
  kernel = params["kernel"] + 4.0 / 2 * params["lora_a"] @ params["lora_b"]
  merged = nn.Dense(5).apply({"params": {"kernel": kernel, "bias": params["bias"]}}, X)
  np.testing.assert_allclose(unmerged, merged, atol=1e-5)
  base = {k: params[k] for k in ("kernel", "bias")}
  assert np.abs(unmerged - nn.Dense(5).apply({"params": base}, X)).max() > 0.1


def test_dropout_acts_on_the_adapter_and_only_with_a_key(params: dict) -> None:
  module = LoraDense(5, rank=2, alpha=4.0, dropout=0.5)
  with_b = {**params, "lora_b": jnp.ones((2, 5))}
  key = {"dropout": jax.random.key(1)}
  calm = module.apply({"params": with_b}, X)
  np.testing.assert_array_equal(calm, module.apply({"params": with_b}, X))
  assert np.abs(calm - module.apply({"params": with_b}, X, rngs=key)).max() > 1e-3
  np.testing.assert_array_equal(  # with B zero, dropout has nothing to act on
    module.apply({"params": params}, X), module.apply({"params": params}, X, rngs=key)
  )


def test_rank_zero_is_the_plain_class() -> None:
  assert Lora(0, 1.0).dense() is nn.Dense
  assert hash(Lora(2, 4.0)) == hash(Lora(2, 4.0))
