"""Tables are total: every row builds, every parameter has one place, one group and one torch name."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import layout, projector_names, tables
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import build
from llava_sp_jax.models.projector import VARIANTS, spatial_token_count
from llava_sp_jax.models.quantize import FORMATS
from llava_sp_jax.models.vit import TOWER_VARIANTS
from llava_sp_jax.training import measure, optimizer
from tests.every_variant import OUT_WIDTH, WIDTH, leaves, model, projector_leaves

GRIDS = (6, 16, 24, 27, 32)


@pytest.fixture(scope="module")
def every_leaf() -> dict[str, jax.ShapeDtypeStruct]:
  """Every path of every variant and tower, adapters and biases on and off, head tied or not."""
  found: dict[str, jax.ShapeDtypeStruct] = {}
  for name in VARIANTS:
    found |= projector_leaves(name, 24)
  for variant in TOWER_VARIANTS:
    found |= leaves(model("none", rank=4, tower=variant, bias=True))
  for name in FORMATS:
    found |= leaves(model("none", quantize=name))
  return found | leaves(model("none", tied=True))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_projector_builds(variant: str, grid: int) -> None:
  config = model(variant, grid=grid)
  if VARIANTS[variant].views and grid < VARIANTS[variant].parts:
    with pytest.raises(config_lib.ConfigError, match=f"a {grid}x{grid} grid is too small for "):
      build.image_token_count(config)
    return
  module = build.model(config)
  images = jax.ShapeDtypeStruct((2, 3, 2 * grid, 2 * grid, 3), np.float32)
  tokens, _ = jax.eval_shape(
    lambda x: module.init_with_output(jax.random.key(0), x, method="encode_image"), images
  )
  count = build.image_token_count(config)
  assert tokens.shape == (2, 3 * count + 1, OUT_WIDTH)  # three images and the newline
  assert count - grid * grid == spatial_token_count(variant, grid)


def test_scales_that_do_not_fit_are_an_error() -> None:
  config = dataclasses.replace(
    model("cropping"), projector=config_lib.ProjectorConfig(variant="cropping", scales=(4, 25))
  )
  with pytest.raises(
    config_lib.ConfigError,
    match=r"model.projector.variant cropping: scales \(4, 25\): expected growing sizes from 1 to",
  ):
    build.model(config)


def test_every_parameter_has_one_row_of_axes(every_leaf: dict) -> None:
  """One row and no other, but for the last resort that all biases and scales share."""
  problems = []
  for path, leaf in every_leaf.items():
    rows = [(p, a) for p, a in sharding.axes_table() if re.search(p, path)]
    special = [r for r in rows if not r[0].startswith("(bias|scale")]  # the last resort
    if len(special) > 1 or not rows:
      problems.append(f"{path}: {[p for p, _ in rows]}")
      continue
    axes = sharding.param_axes(path)
    if len(axes) != leaf.ndim:
      problems.append(f"{path}: shape {leaf.shape}, axes {axes}")
    unknown = {a for a in axes if a is not None and a not in sharding.RULES}
    assert not unknown, path
  assert not problems


def test_every_row_of_axes_is_used(every_leaf: dict) -> None:
  unused = [p for p, _ in sharding.PARAM_AXES if not any(re.search(p, path) for path in every_leaf)]
  assert not unused


def test_every_parameter_gets_a_place(every_leaf: dict) -> None:
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
  places = sharding.shardings(every_leaf, mesh)
  for path, leaf in every_leaf.items():
    assert places[path].shard_shape(leaf.shape)


def test_a_parameter_without_a_row_is_an_error() -> None:
  with pytest.raises(
    KeyError,
    match="no row of PARAM_AXES, and no `axes` of an extractor, matches parameter 'projector/new/thing'",
  ):
    sharding.param_axes("projector/new/thing")


@pytest.mark.parametrize("stage", optimizer.STAGES)
def test_every_parameter_has_one_group_in_each_stage(every_leaf: dict, stage: str) -> None:
  """More than one row may match only where an adapter is taken out of its frozen decoder."""
  groups = {*optimizer.RATES, optimizer.FROZEN}
  for path in every_leaf:
    assert optimizer.group_of(path, stage) in groups
    rows = [p for p, _ in optimizer.STAGES[stage] if re.match(p, path)]
    assert len(rows) == 1 or ("lora_" in path and stage == "finetune"), path
  learning = {p for p in every_leaf if optimizer.group_of(p, stage) != optimizer.FROZEN}
  assert {p for p in every_leaf if p.startswith("projector/")} <= learning


@pytest.mark.parametrize(
  ("stage", "wanted"),
  [
    ("pretrain", r"projector/"),
    ("pretrain_tower", r"(projector|vision_tower)/"),
    ("pretrain_all", r"(projector|vision_tower|language_model)/"),
    ("finetune", r"projector/|language_model/layers/\w+_proj/lora_[ab]$"),
    ("finetune_full", r"(projector|language_model)/"),
  ],
)
def test_what_learns_in_a_stage(every_leaf: dict, stage: str, wanted: str) -> None:
  learning = {p for p in every_leaf if optimizer.group_of(p, stage) != optimizer.FROZEN}
  assert learning == {p for p in every_leaf if re.match(wanted, p)}


def test_every_parameter_has_one_part_and_every_part_is_used(every_leaf: dict) -> None:
  assert {measure.part_of(path) for path in every_leaf} == {part for part, _ in measure.PARTS}
  assert measure.part_of("projector/pool_3/kernel") == "spatial"
  assert measure.part_of("projector/fc1/kernel") == "projector"
  with pytest.raises(KeyError, match="no row of PARTS"):
    measure.part_of("new/kernel")


def test_a_parameter_without_a_group_is_an_error() -> None:
  with pytest.raises(KeyError, match=r"no row of STAGES\['finetune'\] matches parameter 'new/x'"):
    optimizer.group_of("new/x", "finetune")


def torch_names(rows: tuple[tables.NameRule, ...], layers: int) -> dict[str, tables.Match]:
  """All torch names that a table can give, written out, with what they match."""
  names: list[str] = []
  for row in rows:
    found = [row.torch]
    for field in re.findall(r"\{\w+:[^}]*\}", row.torch):
      words = field[1:-1].split(":")[1].split("|")
      found = [name.replace(field, word) for name in found for word in words]
    if "{layer}" in row.torch:
      found = [name.replace("{layer}", str(i)) for name in found for i in range(layers)]
    names += found
  assert len(names) == len(set(names))
  result = {}
  for name in names:
    match = tables.match(name, rows)
    assert match, name
    result[name] = match
  return result


def check_names(shapes: dict[str, Any], rows: tuple[tables.NameRule, ...]) -> None:
  """Each leaf, layer by layer, has one torch name and no other, and its layout is undone."""
  places = {
    (path, layer)
    for path, leaf in shapes.items()
    for layer in (range(leaf.shape[0]) if "/layers/" in path else (None,))
  }
  depths = [leaf.shape[0] for path, leaf in shapes.items() if "/layers/" in path]
  by_place: dict[tuple[str, int | None], list[str]] = {}
  rng = np.random.default_rng(0)
  for name, match in torch_names(rows, layers=max(depths, default=1)).items():
    if match.layer is not None and match.layer >= shapes[match.path].shape[0]:
      continue
    by_place.setdefault((match.path, match.layer), []).append(name)
    shape = shapes[match.path].shape
    array = rng.normal(size=shape if match.layer is None else shape[1:]).astype(np.float32)
    there = match.layout.to_torch(array)
    np.testing.assert_array_equal(match.layout.to_jax(there), array, err_msg=match.path)
  assert set(by_place) == places
  assert all(len(found) == 1 for found in by_place.values())


@pytest.mark.parametrize("grid", [16, 24, 27, 32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_projector_leaf_has_one_torch_name_that_round_trips(variant: str, grid: int) -> None:
  scales = build.view_sizes(model(variant, grid=grid))
  check_names(projector_leaves(variant, grid), projector_names.projector(variant, WIDTH, scales))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("variant", TOWER_VARIANTS)
def test_every_other_leaf_has_one_torch_name_that_round_trips(variant: str, bias: bool) -> None:
  shapes = leaves(model("none", rank=4, tower=variant, bias=bias))
  llama = tuple(r for r in tables.LLAMA if bias or not r.path.endswith("_proj/bias"))
  rows = llama + tables.LORA + tables.TOWERS[variant] + projector_names.projector("none", WIDTH, ())
  check_names(shapes, rows)


def test_layouts_do_what_torch_does() -> None:
  """A linear, a strided and a view-covering convolution against their sums written out."""
  rng = np.random.default_rng(1)
  x, weight = rng.normal(size=3), rng.normal(size=(5, 3))
  np.testing.assert_allclose(x @ layout.linear.to_jax(weight), weight @ x)
  view, kernel = rng.normal(size=(2, 2, 3)), rng.normal(size=(5, 3, 2, 2))
  torch_sum = np.einsum("hwc,ochw->o", view, kernel)
  flat = layout.whole_view(3).to_jax(kernel)
  np.testing.assert_allclose(view.reshape(-1) @ flat, torch_sum)
  np.testing.assert_allclose(np.einsum("hwc,hwco->o", view, layout.conv.to_jax(kernel)), torch_sum)


@pytest.mark.parametrize(
  "name",
  [
    "model.embed_tokens.bias",
    "model.layers.x.input_layernorm.weight",
    "model.layers.0.mlp.w.weight",
  ],
)
def test_names_without_a_row_match_nothing(name: str) -> None:
  assert tables.match(name, tables.LLAMA) is None
  assert not tables.ignored(name)


def test_only_buffers_and_unused_halves_are_ignored() -> None:
  assert tables.ignored("model.layers.0.self_attn.rotary_emb.inv_freq")
  assert tables.ignored("vision_model.embeddings.position_ids")
  assert tables.ignored("text_model.final_layer_norm.weight")
  assert tables.ignored("vision_model.head.probe")
  assert tables.ignored("model.value_projector_mid.1.weight")
  for name in torch_names(tables.LLAMA + tables.LORA, 1):
    assert not tables.ignored(name)
  for variant in TOWER_VARIANTS:
    assert not any(tables.ignored(name) for name in torch_names(tables.TOWERS[variant], 1))
  for name, variant in VARIANTS.items():
    names = torch_names(projector_names.projector(name, WIDTH, variant.scales(24)), 1)
    assert not any(tables.ignored(name) for name in names)


def test_every_tower_has_its_names() -> None:
  assert set(tables.TOWERS) == set(TOWER_VARIANTS)
