"""Adapters: nothing at first, the same as the merged kernel later, and dropout only when asked for."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llava_sp_jax import config as config_lib
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.models.lora import LoraDense, LoraRecipe, fused, keep

X = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


@pytest.fixture
def params() -> dict:
  return LoraDense(5, rank=2, alpha=3.0).init(jax.random.key(0), X)["params"]


def test_fresh_adapters_change_nothing(params: dict) -> None:
  ours = LoraDense(5, rank=2, alpha=3.0).apply({"params": params}, X)
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
  unmerged = LoraDense(5, rank=2, alpha=3.0).apply({"params": params}, X)
  kernel = params["kernel"] + 3.0 / 2 * params["lora_a"] @ params["lora_b"]
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
  assert LoraRecipe(0, 1.0).dense() is nn.Dense
  assert hash(LoraRecipe(2, 4.0)) == hash(LoraRecipe(2, 4.0))


def test_layers_read_their_input_through_one_matmul() -> None:
  """`fused` gives what each layer gives alone, and its program has one product with A."""

  class Pair(nn.Module):
    together: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
      layers = [
        LoraDense(n, rank=2, alpha=4.0, use_bias=False, name=f"l{n}") for n in (3, 5, 5 + 2)
      ]
      return fused(layers, x) if self.together else [layer(x) for layer in layers]

  params = Pair(False).init(jax.random.key(0), X)
  assert jax.tree.structure(Pair(True).init(jax.random.key(0), X)) == jax.tree.structure(params)
  noise = np.random.default_rng(2)
  params = jax.tree.map(lambda p: jnp.asarray(noise.normal(size=p.shape), jnp.float32), params)
  products = {}
  for together in (True, False):
    products[together] = str(jax.make_jaxpr(Pair(together).apply)(params, X)).count("dot_general")
  assert products == {True: 3 + 1 + 3, False: 3 + 3 + 3}
  for ours, alone in zip(Pair(True).apply(params, X), Pair(False).apply(params, X), strict=True):
    np.testing.assert_allclose(ours, alone, atol=1e-5)


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_dropout_keeps_what_it_should(rate: float) -> None:
  """Shares, independence of neighbours in every direction, and other keys give other decisions."""
  shape = (4, 100, 500)
  kept = np.asarray(keep(jax.random.key(0), shape, rate))
  deviation = np.sqrt(rate * (1 - rate) / kept.size)
  assert abs(kept.mean() - (1 - rate)) < 4 * deviation
  centered = kept - kept.mean()
  others = [np.roll(centered, 1, axis) for axis in range(3)]
  others += [np.roll(centered, (1, 1), (1, 2)), keep(jax.random.key(1), shape, rate) - kept.mean()]
  for other in others:
    correlation = (centered * np.asarray(other)).mean() / centered.var()
    assert abs(correlation) < 4 / np.sqrt(kept.size)
  for axis in range(3):  # no row, column or feature is dropped more than chance does
    rest = tuple(a for a in range(3) if a != axis)
    count = kept.size / shape[axis]
    assert np.abs(kept.mean(axis=rest) - (1 - rate)).max() < 5 * np.sqrt(rate * (1 - rate) / count)
  np.testing.assert_array_equal(kept, keep(jax.random.key(0), shape, rate))


@pytest.mark.parametrize("rate", [0.05, 0.5])
@pytest.mark.parametrize("axis", [0, 1])
def test_any_two_rows_and_any_two_columns_are_dropped_independently(rate: float, axis: int) -> None:
  """Squares of their correlations have the mean of chance, 1 / n, and none is far from it."""
  shape = (2048, 512) if axis else (512, 2048)
  for seed in range(3):
    kept = np.asarray(keep(jax.random.key(seed), shape, rate), np.float32)
    centered = np.moveaxis(kept - (1 - rate), axis, 0) / np.sqrt(rate * (1 - rate))
    pairs = (centered @ centered.T / 2048)[np.triu_indices(512, 1)]
    assert abs((pairs**2).mean() * 2048 - 1) < 0.04  # 130,816 pairs, of which those of a row depend
    assert np.abs(pairs).max() < 9 / np.sqrt(2048)


def test_layers_and_steps_drop_independently() -> None:
  """Their keys are those that a scan over layers and the train step make of the run's key."""
  run, rate = jax.random.key(0), 0.05
  keys = [k for step in (1, 2) for k in jax.random.split(jax.random.fold_in(run, step), 4)]
  masks = np.stack([np.asarray(keep(k, (256, 512), rate)).ravel() for k in keys])
  correlations = np.corrcoef(masks)[np.triu_indices(len(keys), 1)]
  assert np.abs(correlations).max() < 4.5 / np.sqrt(masks.shape[1])


@pytest.mark.parametrize("spec", [("fsdp",), (None, "fsdp"), ("data", None, "fsdp")])
def test_a_mask_is_the_same_on_every_mesh(spec: tuple[str | None, ...]) -> None:
  mesh = mesh_lib.create(config_lib.MeshConfig(data=2, fsdp=4))
  place = NamedSharding(mesh, PartitionSpec(*spec))
  key, shape = jax.random.key(0), (8, 16, 64)
  divided = jax.jit(lambda k: keep(k, shape, 0.5), out_shardings=place)(key)
  assert not divided.is_fully_replicated
  np.testing.assert_array_equal(divided, keep(key, shape, 0.5))


@pytest.mark.parametrize("alpha", [1.0, 2.0, 6.0])
def test_adapters_are_scaled_by_alpha_over_rank(params: dict, alpha: float) -> None:
  rng = np.random.default_rng(1)
  with_b = {**params, "lora_b": rng.normal(size=(2, 5)).astype(np.float32)}
  found = LoraDense(5, rank=2, alpha=alpha).apply({"params": with_b}, X)
  wanted = (
    X @ params["kernel"] + params["bias"] + alpha / 2 * (X @ params["lora_a"]) @ with_b["lora_b"]
  )
  np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("rate", [0.05, 0.5])
@pytest.mark.parametrize("together", [False, True])
def test_dropout_leaves_the_mean_as_it_is(params: dict, rate: float, together: bool) -> None:
  """Over many keys the adapter's part is what it is at inference: what is kept is scaled up."""
  with_b = {**params, "lora_b": np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32)}
  dense = {name: LoraDense(5, rank=2, alpha=3.0, dropout=rate, name=name) for name in "ab"}

  class Pair(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
      layers = [m.clone(parent=self) for m in dense.values()]
      return fused(layers, x) if together else [layer(x) for layer in layers]

  variables = {"params": dict.fromkeys("ab", with_b)}
  calm = np.stack(Pair().apply(variables, X))
  keys = jax.random.split(jax.random.key(3), 4000)
  run = jax.jit(jax.vmap(lambda key: jnp.stack(Pair().apply(variables, X, rngs={"dropout": key}))))
  drawn = np.asarray(run(keys))
  error = drawn.std(axis=0) / np.sqrt(len(keys))
  assert (np.abs(drawn.mean(axis=0) - calm) < 5 * error + 1e-6).all()
  lost = np.abs(rate * (calm - (X @ params["kernel"] + params["bias"])))  # what no scale would cost
  assert (lost > 10 * error).any()
