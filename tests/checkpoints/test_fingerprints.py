"""Fingerprints see every bit and every place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llava_sp_jax.checkpoints import fingerprints

RNG = np.random.default_rng(0)
TREE = {
  "a/x": RNG.normal(size=(8, 3)).astype(np.float32),
  "b": RNG.normal(size=5).astype("float32"),
}


def fingerprint(tree: dict) -> str:
  return fingerprints.fingerprint({k: jnp.asarray(v) for k, v in tree.items()})


@pytest.mark.parametrize("bit", range(32))
def test_any_single_bit_changes_it(bit: int) -> None:
  flipped = TREE["a/x"].copy()
  flipped.view(np.uint32)[bit % 8, bit % 3] ^= np.uint32(1 << bit)
  assert fingerprint({**TREE, "a/x": flipped}) != fingerprint(TREE)


@pytest.mark.parametrize("axis", [0, 1])
def test_permutations_change_it(axis: int) -> None:
  rolled = np.roll(TREE["a/x"], 1, axis)
  assert fingerprint({**TREE, "a/x": rolled}) != fingerprint(TREE)


def test_swapping_any_two_values_changes_it() -> None:
  seen = {fingerprint(TREE)}
  for i in range(5):
    for j in range(i):
      swapped = TREE["b"].copy()
      swapped[[i, j]] = swapped[[j, i]]
      seen.add(fingerprint({**TREE, "b": swapped}))
  assert len(seen) == 11


def test_names_shapes_and_dtypes_change_it() -> None:
  x = TREE["a/x"]
  others = [
    {"a/y": x, "b": TREE["b"]},
    {**TREE, "a/x": x.reshape(3, 8)},
    {**TREE, "c": x},
    {"a/x": x},
    {**TREE, "a/x": x.view(np.int32)},
    {**TREE, "a/x": x.astype(jnp.bfloat16)},
  ]
  assert len({fingerprint(TREE), *map(fingerprint, others)}) == len(others) + 1


def test_order_of_the_names_and_the_mesh_do_not_change_it() -> None:
  assert fingerprint(dict(reversed(TREE.items()))) == fingerprint(TREE)
  mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
  spread = jax.device_put(TREE["a/x"], NamedSharding(mesh, PartitionSpec("x")))
  assert fingerprints.fingerprint({**TREE, "a/x": spread, "b": jnp.asarray(TREE["b"])}) == (
    fingerprint(TREE)
  )
