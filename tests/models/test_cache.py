"""The int8 cache against a float cache of the values that its codes stand for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llava_sp_jax import config as config_lib
from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.distributed import sharding
from llava_sp_jax.infer.beam import BeamSearch
from llava_sp_jax.infer.decode import StopRule
from llava_sp_jax.models import build, cache
from llava_sp_jax.models.cache import Codes, KVCache, New

ROWS, LAYERS, HEADS, KV_HEADS, WIDTH, ROOM = 4, 2, 4, 2, 8, 24
HELD = tuple(name for name in cache.FORMATS if name != cache.FLOAT)


def floats(keys_and_values: Any) -> tuple[Any, Any]:
  """Keys and values, dequantised."""
  result: tuple[Any, Any] = jax.tree.map(
    lambda x: x.codes * x.scale if isinstance(x, Codes) else x,
    tuple(keys_and_values[:2]),
    is_leaf=lambda x: isinstance(x, Codes),
  )
  return result


def twin_of(held: KVCache) -> KVCache:
  return KVCache(*floats(held), held.length)


def exact(held: KVCache, new: New) -> New:
  """`new` as `held` will hold it, in floats."""
  return New(*floats(cache.held_as(held, new)))


def normal(seed: int, *shape: int) -> jax.Array:
  """Values whose magnitude differs from head to head."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape) * rng.lognormal(size=(*shape[:-2], 1, 1)), jnp.float32)


def some(seed: int, count: int, stacked: bool = False) -> New:
  keys = [normal(seed + i, ROWS, KV_HEADS, WIDTH, count) for i in range(LAYERS)]
  values = [normal(seed - 1 - i, ROWS, KV_HEADS, count, WIDTH) for i in range(LAYERS)]
  return New(jnp.stack(keys), jnp.stack(values)) if stacked else New(tuple(keys), tuple(values))


def empty(form: str, stacked: bool = False) -> KVCache:
  return cache.allocate(
    LAYERS, ROWS, ROOM, KV_HEADS, WIDTH, jnp.float32, stacked=stacked, form=form
  )


def filled(form: str, counts: list[int], stacked: bool = False) -> KVCache:
  return cache.append(empty(form, stacked), some(100, max(counts), stacked), jnp.asarray(counts))


@pytest.mark.parametrize("axis", [-1, -2])
def test_values_are_within_half_a_step_of_their_own_head_and_position(axis: int) -> None:
  x = normal(0, ROWS, KV_HEADS, 5, 7).at[1, 1].set(0)
  codes, scale = cache.quantize(x, axis)
  assert (codes.dtype, scale.dtype) == (jnp.int8, jnp.float32)
  assert scale.shape == tuple(1 if i == 4 + axis else n for i, n in enumerate(x.shape))
  np.testing.assert_allclose(scale[0], jnp.abs(x).max(axis, keepdims=True)[0] / 127, rtol=1e-6)
  assert (jnp.abs(codes * scale - x) <= scale * 0.5001).all()
  assert int(jnp.abs(codes).max()) == 127
  assert not codes[1, 1].any()


@pytest.mark.parametrize("form", HELD)
@pytest.mark.parametrize("stacked", [False, True])
def test_appending_and_widening_change_what_the_codes_stand_for(form: str, stacked: bool) -> None:
  """Rows of different lengths; what is beyond a count is overwritten later."""
  held, twin = empty(form, stacked), empty(cache.FLOAT, stacked)
  assert held.capacity == twin.capacity == ROOM
  for seed, counts in ((10, [5, 3, 5, 1]), (50, [2, 5, 0, 4])):
    new = some(seed, 5, stacked)
    twin = cache.append(twin, exact(held, new), jnp.asarray(counts))
    held = cache.append(held, new, jnp.asarray(counts))
  held, twin = cache.widen(held, ROOM + 8), cache.widen(twin, ROOM + 8)
  assert held.capacity == ROOM + 8
  jax.tree.map(np.testing.assert_array_equal, twin_of(held), twin)


@pytest.mark.parametrize("form", HELD)
def test_beams_take_codes_and_scales_of_their_parents(form: str) -> None:
  search = BeamSearch(StopRule((), 6, 8, beams=2))
  rows = search.empty(2)._replace(steps=jnp.asarray([3, 2], jnp.int32))
  held = filled(form, [9, 9, 7, 7])
  parents = jnp.asarray([1, 0, 3, 3])
  moved = search.reorder(held, rows, parents)
  jax.tree.map(
    np.testing.assert_array_equal, twin_of(moved), search.reorder(twin_of(held), rows, parents)
  )
  assert any(
    np.any(a != b) for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(held), strict=True)
  )


def decoder(window: int = 0, form: str = cache.FLOAT) -> config_lib.ModelConfig:
  return config_lib.ModelConfig(
    tower=config_lib.TowerConfig(
      image_size=8, patch_size=4, width=8, layers=2, heads=2, mlp_width=8
    ),
    language_model=config_lib.LanguageModelConfig(
      vocab_size=32,
      width=32,
      layers=LAYERS,
      heads=HEADS,
      kv_heads=KV_HEADS,
      head_dim=WIDTH,
      mlp_width=64,
      sliding_window=window,
      window_from_layer=1 if window else 0,
      initializer_range=0.3,
    ),
    projector=config_lib.ProjectorConfig(variant="none"),
    dtype="float32",
    remat="none",
    cache=form,
  )


def step(module: Any, params: Any, held: KVCache, count: int) -> Any:
  """Hidden states, new keys and new values of `count` more positions."""
  tokens = jnp.asarray(np.random.default_rng(3).integers(0, 32, (ROWS, count)))
  at = held.length[:, None] + jnp.arange(count)
  segments = jnp.full(tokens.shape, BRANCHES, jnp.int32)
  variables = {"params": params}
  return module.apply(variables, tokens, at, segments, None, None, held, method="extend")


@pytest.fixture(scope="module")
def params() -> Any:
  return jax.jit(lambda: build.initialize(decoder(), jax.random.key(1)))()


@pytest.mark.parametrize("form", HELD)
@pytest.mark.parametrize(
  ("stacked", "window", "count"), [(True, 0, 1), (False, 0, 1), (False, 4, 3), (True, 4, 1)]
)
def test_attention_reads_what_the_codes_stand_for(
  params: Any, form: str, stacked: bool, window: int, count: int
) -> None:
  module = build.model(decoder(window, form))
  assert module.language_model.cache_format == form
  if not stacked:
    module, params = build.unstacked(module), build.unstack(params)
  held = filled(form, [9, 4, 1, 7], stacked)
  run = jax.jit(lambda held: step(module, params, held, count))
  hidden, new = run(held)
  wanted, pair = run(twin_of(held))
  np.testing.assert_allclose(hidden, wanted, rtol=1e-4, atol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), new, pair)
  other = run(filled(cache.FLOAT, [9, 4, 1, 7], stacked))[0]
  assert 1e-4 < float(jnp.linalg.norm(hidden - other) / jnp.linalg.norm(other)) < 0.05


@pytest.mark.parametrize("form", HELD)
def test_a_sharded_cache_gives_the_same(params: Any, form: str) -> None:
  """Rows over data and fsdp, heads over tensor; the scales lie beside their codes."""
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  module, tree = build.unstacked(build.model(decoder(0, form))), build.unstack(params)
  held = filled(form, [9, 4, 1, 7])
  kept = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor"))
  row = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

  def run(tree: Any, held: KVCache) -> Any:
    hidden, new = step(module, tree, held, 1)
    return hidden, cache.append(held, new, jnp.ones((ROWS,), jnp.int32))

  wanted, grown = jax.jit(run)(tree, held)
  there = KVCache(*jax.device_put(tuple(held[:2]), kept), jax.device_put(held.length, row))
  with jax.set_mesh(mesh):
    placed = jax.device_put(tree, sharding.shardings(tree, mesh))
    hidden, found = jax.jit(run)(placed, there)
  np.testing.assert_allclose(hidden, wanted, rtol=1e-4, atol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    twin_of(found),
    twin_of(grown),
  )
  assert found.keys[0].codes.addressable_shards[0].data.shape == (1, 1, WIDTH, ROOM)
