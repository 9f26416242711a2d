"""One device, fsdp and a three-axis mesh train alike, and arrays really live where the tables say."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh

from llava_sp_jax import config as config_lib
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import build
from llava_sp_jax.training import setup
from tests.conftest import ConfigMaker
from tests.distributed.meshes import MESHES, STEPS, batches, mesh_of, parts, run

Q_KERNEL = "language_model/layers/q_proj/kernel"
SPATIAL = "projector/pool_5/kernel"


@pytest.fixture(scope="module")
def config(tiny_config: ConfigMaker) -> config_lib.Config:
  return tiny_config("finetune", "pooling", train={"steps": STEPS})


@pytest.fixture(scope="module")
def runs(config: config_lib.Config) -> dict[str, tuple[list[float], Any]]:
  return {name: run(config, mesh_of(sizes)) for name, sizes in MESHES.items()}


def shard_share(leaf: jax.Array) -> float:
  """What part of the array the first device holds."""
  return leaf.addressable_shards[0].data.size / leaf.size


@pytest.mark.parametrize("name", ["fsdp", "three"])
def test_losses_do_not_depend_on_the_mesh(runs: dict, name: str) -> None:
  one = runs["one"][0]
  # float32 sums in another order; five steps of AdamW carry the difference on
  np.testing.assert_allclose(runs[name][0], one, rtol=1e-5)
  assert abs(one[-1] - one[0]) > 1e-2, "the losses must move, or equality says nothing"


def test_parameters_live_where_the_table_says(runs: dict) -> None:
  fsdp, three = runs["fsdp"][1], runs["three"][1]
  assert parts(fsdp.frozen[Q_KERNEL]) == [(), ("fsdp",), ("tensor",)]
  assert shard_share(fsdp.frozen[Q_KERNEL]) == 1 / 8
  assert shard_share(three.frozen[Q_KERNEL]) == 1 / 4  # fsdp 2 x tensor 2, copied over data
  for state in (fsdp, three):
    assert parts(state.trainable[SPATIAL]) == [("data", "fsdp", "tensor"), ()]
    assert shard_share(state.trainable[SPATIAL]) == 1 / 8
  assert parts(three.trainable["language_model/layers/q_proj/lora_b"]) == [
    (),
    (),
    ("tensor", "fsdp"),
  ]


@pytest.mark.parametrize("name", ["fsdp", "three"])
def test_moments_live_with_their_parameters(runs: dict, name: str) -> None:
  state = runs[name][1]
  seen: dict[str, int] = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
    path = [k.key for k in keys if isinstance(k, jax.tree_util.DictKey) and "/" in str(k.key)]
    if not path:
      assert leaf.ndim == 0, keys
      continue
    seen[path[0]] = seen.get(path[0], 0) + 1
    assert leaf.shape == state.trainable[path[0]].shape
    assert parts(leaf) == parts(state.trainable[path[0]]), path
  assert seen == dict.fromkeys(state.trainable, 2)  # mu and nu of all that learns


def test_state_per_device_shrinks_with_the_mesh(runs: dict) -> None:
  """All big leaves are sharded: a device of eight holds well under half of what one device holds."""

  def held(state: Any) -> int:
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))

  one = held(runs["one"][1])
  assert held(runs["fsdp"][1]) < one / 4
  assert held(runs["three"][1]) < one / 3


def block_shardings(config: config_lib.Config, mesh: Mesh, monkeypatch: Any) -> list[tuple]:
  """(shape, shape on one device) of the arrays that decoder blocks hand on, as compiled.

  Looking at an array is an effect. flax traces a scanned body once more to see that what it shares
  does not depend on the carry; from 0.12.9 on an effect counts as such a use, so that trace is left out.
  """
  seen: list[tuple] = []
  constrain = nn.with_logical_constraint

  def watch(x: jax.Array, axes: Any) -> jax.Array:
    x = constrain(x, axes)
    if x.shape[1:] == (config.data.row_length, config.model.language_model.width):
      jax.debug.inspect_array_sharding(
        x, callback=lambda s: seen.append((x.shape, s.shard_shape(x.shape)))
      )
    return x

  monkeypatch.setattr(nn, "with_logical_constraint", watch)
  scan = functools.partial(nn.scan, check_constancy_invariants=False)
  monkeypatch.setattr(nn, "scan", scan)
  with jax.set_mesh(mesh):
    state, shardings, tx = setup.initial_state(config, mesh)
    step = setup.compile_step(build.model(config.model), tx, config, shardings)
    batch = mesh_lib.put_batch(next(batches(config)), mesh)
    jax.jit(step).lower(state, batch, jax.random.key(0)).compile()
  return seen


@pytest.mark.parametrize(
  "name",
  [
    pytest.param("fsdp", marks=pytest.mark.slow),
    pytest.param("three", marks=pytest.mark.guard),
  ],
)
def test_activations_between_blocks_are_sharded_over_rows(
  config: config_lib.Config, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
  mesh = mesh_of(MESHES[name])
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  seen = block_shardings(config, mesh, monkeypatch)
  assert seen, "no activation was seen between blocks"
  for shape, on_device in seen:
    assert on_device == (shape[0] // ways, *shape[1:])


@pytest.mark.slow
def test_the_check_of_activations_notices_lost_rules(
  config: config_lib.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  """With rules that put rows nowhere, rows are not sharded: the assertion above can fail."""
  rules = {**sharding.RULES, "batch": None}
  monkeypatch.setattr(sharding, "activation_rules", lambda: tuple(rules.items()))
  seen = block_shardings(config, mesh_of(MESHES["fsdp"]), monkeypatch)
  assert any(shape == on_device for shape, on_device in seen)


def test_the_compiled_step_is_constrained_by_the_rules(config: config_lib.Config) -> None:
  """The lowered step carries a sharding annotation over the batch axes for every block's output."""
  mesh = mesh_of(MESHES["three"])
  with jax.set_mesh(mesh):
    state, shardings, tx = setup.initial_state(config, mesh)
    step = setup.compile_step(build.model(config.model), tx, config, shardings)
    batch = mesh_lib.put_batch(next(batches(config)), mesh)
    text = step.lower(state, batch, jax.random.key(0)).as_text()
  shape = f"tensor<{config.train.batch_size}x{config.data.row_length}x32xf32>"
  lines = [line for line in text.splitlines() if "sharding_constraint" in line and shape in line]
  assert lines
  assert all(re.search(r'\{"data", "fsdp"\}', line) for line in lines)


def test_a_dimension_that_does_not_divide_is_left_whole() -> None:
  mesh = mesh_of(MESHES["fsdp"])
  leaf = jax.ShapeDtypeStruct((2, 12, 32), jnp.float32)
  place = sharding.shardings({Q_KERNEL: leaf}, mesh)[Q_KERNEL]
  assert place.shard_shape(leaf.shape) == leaf.shape


def test_mesh_errors_name_the_sizes() -> None:
  with pytest.raises(config_lib.ConfigError, match="data=3, fsdp=-1, tensor=1 does not make 8"):
    mesh_lib.create(config_lib.MeshConfig(data=3))
  with pytest.raises(
    config_lib.ConfigError, match=r"12 rows cannot be divided over .* = 8 devices"
  ):
    mesh_lib.create(config_lib.MeshConfig(), batch_size=12)
