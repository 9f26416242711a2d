"""Gradients of adapters cross the axis `data`, and so slices, once a step."""

from __future__ import annotations

import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import build
from llava_sp_jax.training import setup, step
from tests.conftest import ConfigMaker
from tests.distributed.meshes import MESHES, batches, mesh_of

COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) .*\{$")
SUMS = re.compile(r" (?:all-reduce|reduce-scatter|all-reduce-start)\(.*replica_groups=(\S+?),? ")
CALLED = re.compile(r"(?:body|to_apply|calls)=%([\w.\-]+)")


def groups_of(text: str) -> list[list[int]]:
  """Of devices: `{{0,4},{1,5}}`, or `[4,2]<=[2,4]T(1,0)`, the rows of a transposed count."""
  if text.startswith("{{"):
    return [[int(n) for n in part.split(",")] for part in re.findall(r"\{([\d,]+)\}", text)]
  found = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
  assert found, text
  shape, counted, order = (
    [int(n) for n in part.split(",")] if part else None for part in found.groups()
  )
  assert shape
  assert counted
  places = np.arange(np.prod(counted)).reshape(counted)
  return np.transpose(places, order).reshape(shape).tolist()


def sums_in_loops(text: str) -> Iterator[list[list[int]]]:
  """The groups of devices of every sum within a loop of a compiled module."""
  lines: dict[str, list[str]] = {}
  for line in text.splitlines():
    if found := COMPUTATION.match(line):
      name = found[1]
      lines[name] = []
    elif lines:
      lines[name].append(line)
  waiting = re.findall(r"body=%([\w.\-]+)", text)
  seen = set()
  while waiting:
    name = waiting.pop()
    if name in seen:
      continue
    seen.add(name)
    for line in lines[name]:
      waiting += [other for other in CALLED.findall(line) if other in lines]
      if found := SUMS.search(line):
        yield groups_of(found[1])


def test_the_groups_of_a_sum_are_read() -> None:
  assert groups_of("{{0,4},{1,5}}") == [[0, 4], [1, 5]]
  assert groups_of("[2,2]<=[4]") == [[0, 1], [2, 3]]
  assert groups_of("[4,2]<=[2,4]T(1,0)") == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.guard
def test_no_layer_waits_for_another_slice(tiny_config: ConfigMaker) -> None:
  config = tiny_config("finetune", "pooling", train={"loss_chunk": 4096})
  mesh = mesh_of(MESHES["three"])
  with jax.set_mesh(mesh):
    state, shardings, tx = setup.initial_state(config, mesh)
    run = setup.compile_step(build.model(config.model), tx, config, shardings)
    batch = mesh_lib.put_batch(next(batches(config)), mesh)
    text = run.lower(state, batch, jax.random.key(0)).compile().as_text()
    found = [group for groups in sums_in_loops(text) for group in groups]
    assert found, "within a slice the layers do sum"
    crossing = [group for group in found if min(group) < 4 <= max(group)]
    assert not crossing


def test_copies_are_of_adapters_alone() -> None:
  tree = {"x/layers/q_proj/lora_a": np.ones((2, 8, 4)), "projector/fc1/kernel": np.ones((8, 4))}
  for name, copies in (("one", 1), ("fsdp", 1), ("three", 2)):
    with jax.set_mesh(mesh_of(MESHES[name])):
      found = jax.jit(lambda tree: sharding.for_groups(tree, step.ADAPTERS))(tree)
    assert found["projector/fc1/kernel"].shape == (8, 4)
    assert found["x/layers/q_proj/lora_a"].shape == ((2, 2, 8, 4) if copies > 1 else (2, 8, 4))


def test_gradients_of_all_groups_are_summed() -> None:
  """Into the shape and dtype of the parameters; those that no group has copies of stay."""
  like = {
    "x/layers/q_proj/lora_a": np.ones((2, 8, 4), jnp.bfloat16),
    "projector/fc1/kernel": np.ones((8, 4)),
  }
  gradients = {
    "x/layers/q_proj/lora_a": np.arange(128, dtype=np.float32).reshape(2, 2, 8, 4),
    "projector/fc1/kernel": np.full((8, 4), 3.0),
  }
  with jax.set_mesh(mesh_of(MESHES["three"])):
    found = jax.jit(lambda tree: sharding.over_groups(tree, like))(gradients)
  adapter = found["x/layers/q_proj/lora_a"]
  assert adapter.dtype == jnp.bfloat16
  expected = gradients["x/layers/q_proj/lora_a"].sum(1)
  np.testing.assert_allclose(adapter.astype(np.float32), expected, rtol=2**-8)  # one rounding
  np.testing.assert_array_equal(found["projector/fc1/kernel"], gradients["projector/fc1/kernel"])
