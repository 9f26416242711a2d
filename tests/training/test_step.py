"""The step: accumulation is exact, the frozen base has no gradient, and big arrays never exist."""

from __future__ import annotations

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import build
from llava_sp_jax.training import loss, setup
from tests.conftest import VOCAB_SIZE, ConfigMaker
from tests.distributed.meshes import batches, mesh_of, parts

NO_DROPOUT = {"lora": {"dropout": 0.0}}


def train(config: config_lib.Config, sizes: tuple[int, ...], steps: int) -> tuple[list[float], Any]:
  mesh = mesh_of(sizes)
  with jax.set_mesh(mesh):
    state, shardings, tx = setup.initial_state(config, mesh)
    step = setup.compile_step(build.model(config.model), tx, config, shardings)
    rows, losses = batches(config), []
    for _ in range(steps):
      state, metrics = step(state, mesh_lib.put_batch(next(rows), mesh), jax.random.key(0))
      losses.append(float(metrics["loss"]))
  return losses, state


def compiled(config: config_lib.Config, sizes: tuple[int, ...]) -> Any:
  mesh = mesh_of(sizes)
  with jax.set_mesh(mesh):
    state, shardings, tx = setup.initial_state(config, mesh)
    step = setup.compile_step(build.model(config.model), tx, config, shardings)
    batch = mesh_lib.put_batch(next(batches(config)), mesh)
    return step.lower(state, batch, jax.random.key(0)).compile()


@pytest.mark.guard
@pytest.mark.parametrize(
  ("stage", "sizes"),
  [("finetune", (2, 2, 2)), pytest.param("pretrain_all", (1, 1, 1), marks=pytest.mark.slow)],
)
def test_accumulation_changes_nothing(
  tiny_config: ConfigMaker, stage: str, sizes: tuple[int, ...]
) -> None:
  """Micro-batches hold different numbers of tokens; the mean is over all of them."""
  losses = {}
  for accumulate in (1, 4):
    changes = {"batch_size": 16, "accumulate": accumulate, "steps": 3}
    config = tiny_config(stage, model=NO_DROPOUT, train=changes)
    losses[accumulate], _ = train(config, sizes, 3)
  weights = next(batches(config))["weights"]
  tokens = [weights[i::4].sum() for i in range(4)]
  assert len(set(tokens)) > 1, "with equal counts a mean of means would be right as well"
  np.testing.assert_allclose(losses[4], losses[1], rtol=1e-6)
  assert abs(losses[1][-1] - losses[1][0]) > 1e-3


def test_a_batch_that_does_not_divide_is_refused() -> None:
  with pytest.raises(
    config_lib.ConfigError, match=r"16 rows .* = 8 devices .* in train.accumulate = 4"
  ):
    mesh_lib.create(config_lib.MeshConfig(), batch_size=16, accumulate=4)


def reference(params: dict, hidden: Any, targets: Any, weights: Any) -> jax.Array:
  logits = (hidden @ params["head"]).astype(jnp.float32)
  return (optax.softmax_cross_entropy_with_integer_labels(logits, targets) * weights).sum()


@pytest.mark.parametrize("chunk", [5, 7, 21, 64])
@pytest.mark.parametrize("trainable", [True, False])
def test_the_loss_in_slices_is_the_loss(chunk: int, trainable: bool) -> None:
  rng = np.random.default_rng(0)
  hidden = jnp.asarray(rng.normal(size=(3, 21, 8)), jnp.float32)
  head = {"head": jnp.asarray(rng.normal(size=(8, 30)), jnp.float32)}
  targets = jnp.asarray(rng.integers(0, 30, (3, 21)))
  weights, image = jnp.asarray(rng.integers(0, 2, (2, 3, 21)), jnp.float32)
  weights = weights * jnp.asarray(rng.uniform(0.5, 2.0, (3, 21)), jnp.float32)

  def ours(params: dict, hidden: jax.Array) -> jax.Array:
    trained, frozen = (params, {}) if trainable else ({}, head)
    total = loss.sums(
      lambda p, h: h @ p["head"], chunk, trained, frozen, hidden, targets, weights, image
    )
    return 3 * total[0]  # the cotangent need not be one

  wanted = jax.value_and_grad(lambda p, h: 3 * reference(p, h, targets, weights), argnums=(0, 1))
  value, (d_head, d_hidden) = jax.value_and_grad(ours, argnums=(0, 1))(head, hidden)
  reference_value, (r_head, r_hidden) = wanted(head, hidden)
  np.testing.assert_allclose(value, reference_value, rtol=1e-6)
  np.testing.assert_allclose(d_hidden, r_hidden, atol=1e-5)
  np.testing.assert_allclose(d_head["head"], r_head["head"] * trainable, atol=1e-5)
  _, right, about_image = loss.sums(
    lambda p, h: h @ p["head"], chunk, head, {}, hidden, targets, weights, image
  )
  hits = ((hidden @ head["head"]).argmax(-1) == targets) * weights
  np.testing.assert_allclose(right, hits.sum(), rtol=1e-6)
  wanted_image = reference(head, hidden, targets, weights * image)
  np.testing.assert_allclose(about_image, wanted_image, rtol=1e-6)


def big_logits(text: str, rows: int, length: int) -> list[str]:
  """Arrays of the program with a vocabulary and all positions of a row."""
  found = re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)
  shapes = {tuple(map(int, dims.split(","))) for dims in found}
  return [str(s) for s in shapes if VOCAB_SIZE in s and np.prod(s) >= length * VOCAB_SIZE]


@pytest.mark.guard
def test_logits_of_a_whole_row_never_exist(tiny_config: ConfigMaker) -> None:
  config = tiny_config("finetune", train={"loss_chunk": 16})
  text = compiled(config, (1, 8, 1)).as_text()
  assert not big_logits(text, 8, config.data.row_length)
  whole = tiny_config("finetune", train={"loss_chunk": 4096})
  assert big_logits(compiled(whole, (1, 8, 1)).as_text(), 8, whole.data.row_length)


@pytest.mark.slow
def test_the_program_does_not_grow_with_the_number_of_slices(tiny_config: ConfigMaker) -> None:
  size = {
    chunk: len(compiled(tiny_config("finetune", train={"loss_chunk": chunk}), (1, 1, 1)).as_text())
    for chunk in (104, 8)
  }
  assert size[8] < 1.1 * size[104]


@pytest.mark.guard
def test_the_frozen_base_has_no_gradient_and_no_moments(tiny_config: ConfigMaker) -> None:
  """The optimizer knows the trainable parameters alone, and no kernel-sized gradient of the base exists."""
  config = tiny_config("finetune")
  mesh = mesh_of((1, 1, 1))
  with jax.set_mesh(mesh):
    state, shardings, tx = setup.initial_state(config, mesh)
    paths = {
      k.key
      for keys, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
      for k in keys
      if isinstance(k, jax.tree_util.DictKey) and "/" in str(k.key)
    }
    assert paths == set(state.trainable)
    assert not paths & set(state.frozen)
    step = setup.compile_step(build.model(config.model), tx, config, shardings)
    batch = mesh_lib.put_batch(next(batches(config)), mesh)
    before = {p: np.asarray(x) for p, x in state.frozen.items()}
    jaxpr = str(jax.make_jaxpr(step)(state, batch, jax.random.key(0)))
    state, _ = step(state, batch, jax.random.key(0))
  for path, array in before.items():
    np.testing.assert_array_equal(array, state.frozen[path], err_msg=path)
  # A gradient of gate_proj's kernel would be a product of this shape; forward products have rows.
  model = config.model.language_model
  kernel = f"f32[{model.width},{model.mlp_width}] = dot_general"
  assert kernel not in jaxpr
  full = tiny_config("pretrain_all")
  with jax.set_mesh(mesh):
    state, shardings, tx = setup.initial_state(full, mesh)
    step = setup.compile_step(build.model(full.model), tx, full, shardings)
    batch = mesh_lib.put_batch(next(batches(full)), mesh)
    assert kernel in str(jax.make_jaxpr(step)(state, batch, jax.random.key(0)))


@pytest.mark.guard
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_state_is_donated(tiny_config: ConfigMaker, accumulate: int) -> None:
  config = tiny_config("finetune", train={"batch_size": 16, "accumulate": accumulate})
  with warnings.catch_warnings():
    warnings.simplefilter("error")  # "Some donated buffers were not usable"
    program = compiled(config, (1, 8, 1))
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes > 0.99 * memory.output_size_in_bytes


@pytest.mark.guard
def test_a_replicated_base(tiny_config: ConfigMaker) -> None:
  """The same losses; the base is whole on each device of fsdp, trainable parameters are still divided."""
  runs = {
    base: train(tiny_config("finetune", mesh={"base": base}, model=NO_DROPOUT), (1, 8, 1), 2)
    for base in sharding.PRESETS
  }
  for losses, _ in runs.values():
    np.testing.assert_allclose(losses, runs["shard"][0], rtol=1e-5)
  state = runs["replicate"][1]
  kernel = "language_model/layers/gate_proj/kernel"
  assert parts(state.frozen[kernel]) == [(), (), ("tensor",)]
  assert state.frozen[kernel].sharding.is_fully_replicated
  assert parts(state.trainable["projector/pool_5/kernel"])[0] == ("data", "fsdp", "tensor")
  with pytest.raises(config_lib.ConfigError, match=r"mesh.base: unknown 'nope'; known: rep"):
    sharding.shardings({}, mesh_of((1, 8, 1)), "nope")


COLLECTIVE = re.compile(
  r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(text: str) -> list[tuple[str, int]]:
  """(kind, elements of the largest array in its result) of each collective of a program."""
  result = []
  for shapes, kind in COLLECTIVE.findall(text):
    sizes = [
      np.prod([int(d) for d in dims.split(",") if d])
      for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)
    ]
    result.append((kind, int(max(sizes))))
  return result


@pytest.mark.guard
@pytest.mark.parametrize("variant", [pytest.param("pooling", marks=pytest.mark.slow), "cropping"])
def test_spatial_kernels_and_their_gradients_stay(tiny_config: ConfigMaker, variant: str) -> None:
  """No collective is as large as a kernel of more than one view: what moves are views and sums."""
  width = 256  # kernels must be larger than all that has to move
  changes = {"projector": {"token_width": width, "variant": variant}, "lora": {"rank": 2}}
  config = tiny_config("finetune", variant, model=changes)
  moved = collectives(compiled(config, (2, 2, 2)).as_text())
  assert moved
  kernel = 6 * 6 * config.model.tower.width * width
  largest = max(size for _, size in moved)
  assert largest < kernel / 8, (kernel, sorted(moved, key=lambda m: -m[1])[:5])
