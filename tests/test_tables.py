"""Tables are total: every row builds, every parameter has one place, one group and one torch name."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType

from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import layout, projector_names, tables
from llava_sp_jax.data import conversation, image, packing, samples, sources
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import build
from llava_sp_jax.models.layers import ROPES
from llava_sp_jax.models.projector import VARIANTS, spatial_token_count
from llava_sp_jax.models.quantize import FORMATS
from llava_sp_jax.models.vit import TOWER_VARIANTS
from llava_sp_jax.training import measure, optimizer
from tests import documents
from tests.conftest import REPOSITORY

GRIDS = (6, 16, 24, 27, 32)
WIDTH, TOKEN_WIDTH, OUT_WIDTH = 8, 4, 16
CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))


def model(
  variant: str,
  rank: int = 0,
  grid: int = 24,
  tower: str = "clip",
  tied: bool = False,
  bias: bool = False,
  quantize: str = "none",
) -> config_lib.ModelConfig:
  """A model of few numbers with every kind of parameter that the variant and tower have."""
  sizes = {"width": OUT_WIDTH, "head_dim": 4, "mlp_width": 24}
  if quantize != "none":
    sizes = {"width": 64, "head_dim": 16, "mlp_width": 128}  # whole blocks
  return config_lib.ModelConfig(
    tower=config_lib.TowerConfig(
      variant=tower,
      image_size=2 * grid,
      patch_size=2,
      width=WIDTH,
      layers=3,
      heads=2,
      mlp_width=12,
    ),
    language_model=config_lib.LanguageModelConfig(
      vocab_size=32,
      layers=2,
      heads=4,
      kv_heads=2,
      tie_embeddings=tied,
      attention_bias=bias,
      **sizes,
    ),
    projector=config_lib.ProjectorConfig(variant=variant, token_width=TOKEN_WIDTH),
    lora=config_lib.LoraConfig(rank=rank),
    image_newline=True,
    quantize=quantize,
  )


def leaves(config: config_lib.ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
  return flatten_dict(build.abstract(config), sep="/")


@functools.cache
def projector_leaves(variant: str, grid: int) -> dict[str, jax.ShapeDtypeStruct]:
  """The leaves of a projector alone, which is quicker than the whole model."""
  module = build.model(model(variant, grid=grid)).projector
  features = jax.ShapeDtypeStruct((1, grid, grid, WIDTH), np.float32)
  tree = jax.eval_shape(module.init, jax.random.key(0), features)["params"]
  return {f"projector/{path}": leaf for path, leaf in flatten_dict(tree, sep="/").items()}


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


UNKNOWN: dict[str, tuple[Callable[[], Any], Any]] = {
  "model.projector.variant": (lambda: build.model(model("nope")), VARIANTS),
  "model.tower.variant": (lambda: build.model(model("none", tower="nope")), TOWER_VARIANTS),
  "model.language_model.rope_scaling.kind": (
    lambda: build.model(
      config_lib.from_dict(
        {"language_model": {"rope_scaling": {"kind": "nope"}}}, config_lib.ModelConfig, "model"
      )
    ),
    ROPES,
  ),
  "model.quantize": (lambda: build.model(model("none", quantize="nope")), FORMATS),
  "optimizer.moment_dtype": (
    lambda: optimizer.build(config_lib.OptimizerConfig(moment_dtype="nope"), 1, []),
    optimizer.MOMENT_DTYPES,
  ),
  "optimizer.stage": (lambda: optimizer.group_of("projector/x", "nope"), optimizer.STAGES),
  **{
    key: (lambda key=key, table=table: config_lib.lookup(key, "nope", table), table)
    for key, table in (
      ("data.template", conversation.TEMPLATES), ("data.turns", conversation.TURNS),
      ("data.augment", image.AUGMENTS), ("data.source", sources.SOURCES),
      ("data.packing", packing.PACKINGS), ("data.too_long", samples.TOO_LONG),
    )
  },
}  # fmt: skip


@pytest.mark.parametrize("key", UNKNOWN)
def test_unknown_names_list_the_known_ones(key: str) -> None:
  call, table = UNKNOWN[key]
  with pytest.raises(config_lib.ConfigError) as error:
    call()
  assert str(error.value) == f"{key}: unknown 'nope'; known: {', '.join(sorted(table))}"


def load_config(path: Path) -> ModuleType:
  spec = importlib.util.spec_from_file_location(f"configs_{path.stem}", path)
  assert spec
  assert spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def documented_options(path: Path) -> list[str]:
  """Each option of a config's docstring: `variant=a|b` gives each value, `seed=0` gives itself."""
  text = (load_config(path).__doc__ or "").partition("Options after the colon")[2]
  result = []
  for key, values in re.findall(r"(\w+)=(<[^>]*>|[\w.|/-]+)", text):
    if not values.startswith("<"):
      result += [f"{key}={value}" for value in values.rstrip(".").split("|")]
  return result


# Options that a recipe cannot do without.
NEEDED = {"finetune": "init=CKPT,data=FILE,"}
CASES = [(path, option) for path in CONFIGS for option in ["", *documented_options(path)]]


@pytest.mark.parametrize(("path", "option"), CASES, ids=[f"{p.stem}:{o}" for p, o in CASES])
def test_every_config_validates_and_builds(path: Path, option: str) -> None:
  with documents.stand_ins():
    made = load_config(path).get_config(NEEDED.get(path.stem, "") + option)
  config = config_lib.from_dict(made.to_dict())
  shapes = leaves(config.model)
  assert config_lib.from_json(config_lib.to_json(config)) == config
  assert config.data.template in conversation.TEMPLATES
  assert config.data.turns in conversation.TURNS
  assert config.data.row_length > build.image_token_count(config.model)
  learning = [p for p in shapes if optimizer.group_of(p, config.optimizer.stage) != "frozen"]
  assert learning


@pytest.mark.parametrize("path", CONFIGS, ids=[p.stem for p in CONFIGS])
def test_every_config_opens_with_its_command_and_refuses_unknown_options(path: Path) -> None:
  module = load_config(path)
  assert f"--config configs/{path.name}" in (module.__doc__ or "").partition("\n\n")[0]
  with pytest.raises(config_lib.ConfigError, match=r"unknown option 'colour' after ':'; known: "):
    module.get_config("colour=red")


def test_unknown_keys_and_wrong_types_are_all_named_at_once() -> None:
  values = {
    "modle": {},
    "train": {"steps": "many", "stepz": 1},
    "data": 3,
    "model": {"remat": 1, "tower": {"width": True}, "projector": {"scales": [4, 8.5]}},
  }
  with pytest.raises(config_lib.ConfigError) as error:
    config_lib.from_dict(values)
  lines = str(error.value).splitlines()[1:]
  assert [line.strip().partition(":")[0] for line in lines] == [
    "config.modle",
    "config.train.stepz",
    "config.train.steps",
    "config.data",
    "config.model.remat",
    "config.model.tower.width",
    "config.model.projector.scales[1]",
  ]
  assert ", ".join(f.name for f in dataclasses.fields(config_lib.TrainConfig)) in str(error.value)


@pytest.mark.parametrize(("saved", "policy"), [(True, "full"), (False, "none")])
def test_runs_saved_before_policies_had_names_open(saved: bool, policy: str) -> None:
  values = config_lib.to_dict(config_lib.Config())
  values["model"]["remat"] = saved
  assert config_lib.from_json(json.dumps(values)).model.remat == policy


def test_numbers_typed_by_a_user_keep_their_kind() -> None:
  """Scales are whole numbers, image means are not; an empty list is one."""
  config = config_lib.override(
    config_lib.Config(),
    {
      "config.model.projector.scales": "4,8, 12",
      "config.data.image_mean": "(1, 0.5, 0)",
    },
  )
  assert config.model.projector.scales == (4, 8, 12)
  assert all(type(size) is int for size in config.model.projector.scales)
  assert config.data.image_mean == (1.0, 0.5, 0.0)
  back = config_lib.override(config, {"config.model.projector.scales": "()"})
  assert back.model.projector.scales == ()
  with pytest.raises(config_lib.ConfigError, match=r"scales\[1\]: expected int, found 0.5"):
    config_lib.override(config, {"config.model.projector.scales": "4,0.5"})
