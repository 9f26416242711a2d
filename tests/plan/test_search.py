"""The search picks the fastest plan that fits, within its budget of compiles."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax import recipes
from llava_sp_jax.plan import search

DEVICES, LIMIT = 16, 100
REMAT = {"full": (1.3, 1), "attention": (1.2, 2), "gates": (1.1, 4), "projections": (1.0, 5),
         "minimal": (1.05, 8), "none": (0.98, 20)}  # fmt: skip
BASE = {"shard": (0.2, 60 // 16), "replicate_tower": (0.1, 10), "replicate_attention": (0.05, 30),
        "replicate_most": (0.02, 45), "replicate": (0.0, 60)}  # fmt: skip


def world(config: config_lib.Config) -> tuple[float, int]:
  """(seconds, bytes) in a made-up world whose best plan can be found by trying everything."""
  rows = config.train.batch_size // config.train.accumulate // (config.mesh.data * config.mesh.fsdp)
  slow, kept = REMAT[config.model.remat]
  tensor = config.mesh.tensor
  gathered, base = BASE[config.mesh.base]
  seconds = slow * (1 + 0.3 * (tensor - 1)) + 0.05 * config.train.accumulate
  return seconds + gathered, base // tensor + rows * kept * 4 // tensor


class Compiler:
  def __init__(self, limit: int = LIMIT):
    self.calls, self._limit = list[config_lib.Config](), limit

  def __call__(self, config: config_lib.Config) -> search.Outcome:
    assert config not in self.calls, "compiled twice"
    self.calls.append(config)
    seconds, used = world(config)
    fits = used <= self._limit
    return search.Outcome(fits, seconds if fits else math.nan, used)


def start(**train_keys: int) -> config_lib.Config:
  return config_lib.from_dict(
    {"train": {"batch_size": 128, **train_keys}, "model": {"remat": "projections"}}
  )


def exhaustive(config: config_lib.Config, limit: int) -> float:
  walk = search._Walk(config, search.axes(config, DEVICES), 0, None)
  points = [()]
  for axis in walk.axes:
    points = [(*p, i) for p in points for i in range(len(axis.values))]
  results = [world(walk._at(p)) for p in points if walk._divides(p)]
  return min(seconds for seconds, used in results if used <= limit)


@pytest.mark.parametrize("limit", [25, 40, 100, 1000])
def test_finds_the_best_that_fits(limit: int) -> None:
  compiler = Compiler(limit)
  tried = search.search(start(), DEVICES, 200, compiler)
  best = search.best(tried)
  assert best is not None
  assert best.outcome.hbm <= limit
  assert best.outcome.seconds == pytest.approx(exhaustive(start(), limit))


@pytest.mark.parametrize("budget", [1, 2, 5, 9])
def test_respects_the_budget(budget: int) -> None:
  compiler = Compiler()
  assert len(search.search(start(), DEVICES, budget, compiler)) == budget == len(compiler.calls)


def test_starts_with_the_config_itself() -> None:
  compiler = Compiler()
  search.search(start(accumulate=4), DEVICES, 3, compiler)
  first = compiler.calls[0]
  assert (first.train.accumulate, first.model.remat, first.mesh.fsdp) == (4, "projections", 16)


def test_nothing_fits() -> None:
  tried = search.search(start(), DEVICES, 12, Compiler(limit=0))
  assert search.best(tried) is None
  assert tried[-1].config.model.remat == "full"


def test_candidates_divide_their_rows() -> None:
  compiler = Compiler()
  search.search(start(), DEVICES, 60, compiler)
  for config in compiler.calls:
    parts = config.mesh.data * config.mesh.fsdp * config.train.accumulate
    assert config.train.batch_size % parts == 0
    assert config.mesh.data * config.mesh.fsdp * config.mesh.tensor == DEVICES


def test_slices_are_joined_along_data() -> None:
  compiler = Compiler()
  search.search(start(), DEVICES, 60, compiler, slices=2)
  assert len({config.mesh for config in compiler.calls}) > 2
  assert all(config.mesh.data % 2 == 0 for config in compiler.calls)


def test_errors_of_one_candidate_say_nothing_of_richer_ones() -> None:
  def broken(config: config_lib.Config) -> search.Outcome:
    return search.Outcome(False, math.nan, 0)

  assert len(search.search(start(accumulate=8), DEVICES, 4, broken)) > 1


def test_train_takes_the_recipe(tmp_path: Path) -> None:
  found = search.search(start(), DEVICES, 30, Compiler())
  best = search.best(found)
  assert best is not None
  file = tmp_path / "found.py"
  file.write_text(search.recipe(best.config, "Found by a test."))
  assert recipes.load(str(file)) == best.config


def test_the_mesh_of_the_config_is_where_a_search_starts() -> None:
  """Also one that is not among those that it would try."""
  compiler = Compiler()
  own = dataclasses.replace(start().mesh, data=4, fsdp=1, tensor=DEVICES // 4)
  search.search(dataclasses.replace(start(), mesh=own), DEVICES, 3, compiler)
  assert compiler.calls[0].mesh == own
