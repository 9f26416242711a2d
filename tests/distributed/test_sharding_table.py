"""Where each kind of array lives, written out; what does not divide; what a preset changes."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import layers

MESH = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
ALL = ("data", "fsdp", "tensor")
D, F, T = ("data",), ("fsdp",), ("tensor",)
# path: (shape, mesh axes of each dimension, those where every device of fsdp holds it whole)
PLACES: dict[str, tuple[tuple[int, ...], list[Any], list[Any]]] = {
  "language_model/token_embed/embedding": ((8, 8), [T, F], [T, None]),
  "language_model/lm_head/kernel": ((8, 8), [F, T], [None, T]),
  "language_model/layers/q_proj/kernel": ((3, 8, 8), [None, F, T], [None, None, T]),
  "language_model/layers/v_proj/bias": ((3, 8), [None, T], [None, T]),
  "language_model/layers/o_proj/kernel": ((3, 8, 8), [None, T, F], [None, T, None]),
  "language_model/layers/up_proj/kernel_q": ((3, 8, 8), [None, F, T], [None, None, T]),
  "language_model/layers/down_proj/kernel_scale": ((3, 8, 8), [None, T, F], [None, T, None]),
  "language_model/layers/gate_proj/lora_a": ((3, 8, 8), [None, F, None], [None, None, None]),
  "language_model/layers/down_proj/lora_a": (
    (3, 8, 8), [None, ("tensor", "fsdp"), None], [None, T, None]
  ),
  "language_model/layers/q_proj/lora_b": (
    (3, 8, 8), [None, None, ("tensor", "fsdp")], [None, None, T]
  ),
  "language_model/layers/o_proj/lora_b": ((3, 8, 8), [None, None, F], [None, None, None]),
  "language_model/layers/attn_norm/scale": ((3, 8), [None, None], [None, None]),
  "vision_tower/layers/fc1/kernel": ((3, 8, 8), [None, F, T], [None, None, T]),
  "vision_tower/layers/fc2/kernel": ((3, 8, 8), [None, T, F], [None, T, None]),
  "vision_tower/patch_embed/kernel": ((8, 8), [None, F], [None, None]),
  "projector/fc1/kernel": ((8, 8), [F, T], [None, T]),
  "projector/fc1/bias": ((8,), [T], [T]),
  "projector/fc2/kernel": ((8, 8), [T, F], [T, None]),
  "projector/crop_5/kernel": ((16, 8), [ALL, None], [ALL, None]),
  "projector/detail_16/conv/kernel": ((3, 3, 8, 8), [None, None, ALL, None], [None, None, ALL, None]),
  "projector/out/kernel": ((8, 8), [None, F], [None, None]),
}  # fmt: skip


def spec(place: Any, ndim: int) -> list[Any]:
  found = [*place.spec, *[None] * (ndim - len(place.spec))]
  return [(x,) if isinstance(x, str) else x for x in found]


class State(struct.PyTreeNode):
  """The fields of a train state that hold parameters."""

  trainable: Any
  frozen: Any
  opt_state: Any


@pytest.mark.parametrize("path", PLACES)
def test_arrays_live_where_the_table_says(path: str) -> None:
  """As a parameter that learns, as its moments, and as one of the frozen base under each preset."""
  shape, wanted, whole = PLACES[path]
  leaf = jax.ShapeDtypeStruct(shape, np.float32)
  state = State({path: leaf}, {path: leaf}, {"mu": {path: leaf}, "count": leaf})
  tower = whole if path.startswith("vision_tower/") else wanted
  attention = whole if re.search("layers/[qkvo]_proj/", path) else tower
  most = wanted if re.search("layers/(gate|up)_proj/", path) else whole
  placed = {
    "shard": wanted,
    "replicate": whole,
    "replicate_tower": tower,
    "replicate_attention": attention,
    "replicate_most": most,
  }
  assert set(placed) == set(sharding.PRESETS)
  for base, frozen in placed.items():
    places = sharding.shardings(state, MESH, base)
    assert spec(places.trainable[path], len(shape)) == wanted
    assert spec(places.opt_state["mu"][path], len(shape)) == wanted
    assert spec(places.opt_state["count"], len(shape)) == [None] * len(shape)
    assert spec(places.frozen[path], len(shape)) == frozen, base


@pytest.mark.parametrize(
  ("size", "axes"), [(16, ALL), (8, ALL), (4, ("data", "fsdp")), (6, D), (12, ("data", "fsdp")),
                     (3, None)],
)  # fmt: skip
def test_axes_that_do_not_divide_are_left_out(size: int, axes: Any) -> None:
  """Those axes stay that divide it into the most parts; of equal ones, the first."""
  path = "projector/pool_0/kernel"
  leaf = jax.ShapeDtypeStruct((size, 8), np.float32)
  place = sharding.shardings({path: leaf}, MESH)[path]
  assert spec(place, 2)[0] == axes
  ways = np.prod([2] * len(axes or ()), dtype=int)
  assert place.shard_shape(leaf.shape) == (size // ways, 8)


def test_rules_of_activations_are_the_table() -> None:
  rules = dict(sharding.activation_rules())
  assert rules["batch"] == ("data", "fsdp")
  assert (rules["length"], rules["layers"]) == (None, None)
  assert (rules["heads"], rules["mlp"], rules["vocab"]) == ("tensor",) * 3
  assert rules["contraction"] == ALL


@pytest.mark.parametrize(
  ("channels", "spec"),
  [
    (8, (None, ("data", "fsdp"))),  # enough channels for all devices
    (4, (("data",), ("fsdp",))),  # too few: the longer axis, and what it leaves divides the images
  ],
)
def test_what_a_contraction_leaves_divides_the_images(channels: int, spec: Any) -> None:
  mesh = jax.make_mesh((2, 4, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.activation_rules()):
    found = jax.jit(lambda x: layers.constrain(x, layers.REST, "contraction"))(
      jnp.zeros((4, channels))
    )
  wanted = NamedSharding(mesh, PartitionSpec(*spec))
  assert found.sharding.is_equivalent_to(wanted, 2)
