"""Packed rows train as their samples do alone: loss, gradients, who sees whom, one program."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.data import pipeline
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.models import build
from llava_sp_jax.training import setup, step
from tests.conftest import ConfigMaker
from tests.data.mixed import COUNT, make, mixed_config

TOLERANCE = 1e-6  # relative, float32: only the order of sums differs


@pytest.fixture(scope="module")
def config(tiny_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> config_lib.Config:
  """Anyres pictures, one or two to a sample, and samples of text."""
  return mixed_config(tiny_config, tmp_path_factory.mktemp("mixed"))


def epoch(data: config_lib.DataConfig) -> tuple[dict[str, np.ndarray], list[list[pipeline.Held]]]:
  """All rows of an epoch in one batch, and what they hold."""
  rows = make(data, batch_size=1)
  rows = make(data, batch_size=len(rows.stream.epoch(0)))
  batch = next(rows)
  return batch, batch.pop(pipeline.SAMPLES)


@pytest.fixture(scope="module")
def params(config: config_lib.Config) -> Any:
  """Random ones, with adapters that are not zero."""
  tree = jax.jit(lambda: build.initialize(config.model, jax.random.key(0)))()
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noisy = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
  return jax.tree.unflatten(structure, noisy)


def relative(a: Any, b: Any) -> float:
  """The distance of two trees by the size of the second."""
  flat = [
    np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(t)]) for t in (a, b)
  ]
  return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1]))


@pytest.mark.guard
@pytest.mark.parametrize("turns", ["chain", "branch"])
def test_loss_and_gradients_are_those_of_the_samples_alone(
  config: config_lib.Config, params: Any, turns: str
) -> None:
  data = config.data
  if turns == "branch":  # needs exactly one picture
    kept = [s for s in _samples(data) if isinstance(s.get("image"), str)]
    data = dataclasses.replace(data, turns=turns, path=_write(data, kept))
  module = build.model(config.model)
  grad = jax.jit(
    jax.value_and_grad(lambda p, b: step.loss_and_counts(module, p, b, 512), has_aux=True)
  )
  packed, rows = epoch(data)
  alone, singles = epoch(dataclasses.replace(data, packing="none"))
  assert len(rows) < len(singles) / 2
  assert sorted(h.sample for row in rows for h in row) == list(range(len(singles)))
  (loss, counts), grads = grad(params, packed)
  (wanted, wanted_counts), wanted_grads = grad(params, alone)
  assert counts["count"] == wanted_counts["count"] > COUNT
  assert abs(loss - wanted) <= TOLERANCE * wanted
  for part in wanted_grads:
    assert relative(grads[part], wanted_grads[part]) <= TOLERANCE, part


def _samples(data: config_lib.DataConfig) -> list[dict[str, Any]]:
  import json

  return json.loads(Path(data.path).read_text())


def _write(data: config_lib.DataConfig, samples: list[dict[str, Any]]) -> str:
  import json

  path = Path(data.path).with_name("some.json")
  path.write_text(json.dumps(samples))
  return str(path)


def test_no_sample_sees_another(config: config_lib.Config, params: Any) -> None:
  """Other words and another picture in one sample leave the others' bits alone."""
  batch, _ = epoch(config.data)
  module = build.model(config.model)
  run = jax.jit(
    lambda b: module.apply(
      {"params": params}, b["tokens"], b["positions"], b["segments"], b["images"], b["slots"]
    )
  )
  before = np.asarray(run(batch))
  sample = batch["segments"] // BRANCHES
  assert sample.max(axis=1).min() >= 2
  for number in range(1, int(sample.max()) + 1):
    mine = sample == number
    changed = {**batch, "tokens": np.where(mine & (batch["slots"] < 0), 7, batch["tokens"])}
    images = batch["images"].copy()
    tile_tokens = build.image_token_count(config.model)
    last = config.data.images_per_row
    for row in range(len(images)):
      tiles = np.unique(batch["slots"][row][mine[row]] // tile_tokens)
      images[row, [t for t in tiles if 0 <= t < last]] *= -1
    after = np.asarray(run({**changed, "images": images}))
    others = (sample > 0) & ~mine
    np.testing.assert_array_equal(after[others], before[others])
    rows = mine.any(axis=1)
    assert rows.any()
    assert (np.abs(after - before).max(axis=-1)[rows] * mine[rows]).max(axis=1).min() > 0


@pytest.mark.guard
@pytest.mark.parametrize(
  ("packing", "programs"),
  [("first_fit", {1}), pytest.param("buckets", {1, 2, 3, 4}, marks=pytest.mark.slow)],
)
def test_programs_for_a_whole_epoch(
  config: config_lib.Config, packing: str, programs: set[int]
) -> None:
  config = dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, packing=packing),
    train=dataclasses.replace(config.train, batch_size=2),
  )
  mesh = jax.make_mesh(
    (1, 1, 1),
    mesh_lib.AXES,
    devices=jax.devices()[:1],
    axis_types=(jax.sharding.AxisType.Auto,) * 3,
  )
  rows = make(config.data, batch_size=2)
  steps = -(-len(rows.stream.epoch(0)) // 2)
  with jax.set_mesh(mesh):
    state, shardings, tx = setup.initial_state(config, mesh)
    run = setup.compile_step(build.model(config.model), tx, config, shardings)
    lengths = set()
    for _ in range(steps):
      batch = next(rows)
      batch.pop(pipeline.SAMPLES)
      lengths.add(batch["tokens"].shape[1])
      state, metrics = run(state, mesh_lib.put_batch(batch, mesh), jax.random.key(0))
      assert np.isfinite(metrics["loss"])
  assert run._cache_size() == len(lengths)
  assert len(lengths) in programs
