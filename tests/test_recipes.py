"""The paper's recipes: its numbers, every size and variant as shapes, and the real step lowered."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llava_sp_jax import config as config_lib
from llava_sp_jax import recipes
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.distributed import sharding
from llava_sp_jax.models import build
from llava_sp_jax.models.projector import VARIANTS, spatial_token_count
from llava_sp_jax.training import optimizer, setup, state
from tests.conftest import REPOSITORY

# What stands in the original's scripts (FACTS: pretrain.sh, finetune_lora.sh), by recipe.
PAPER: dict[str, dict[str, Any]] = {
  "pretrain": {
    "train.steps": 2180,
    "data.packing": "balanced",
    "data.samples_per_batch": 256,
    "data.template": "plain",
    "data.row_length": 2048,
    "model.lora.rank": 0,
    "optimizer.stage": "pretrain",
    "optimizer.projector_learning_rate": 1e-3,
  },
  "finetune_lora": {
    "train.steps": 5197,
    "data.packing": "balanced",
    "data.samples_per_batch": 128,
    "data.template": "v1",
    "data.row_length": 2048,
    "model.lora.rank": 128,
    "model.lora.alpha": 256.0,
    "model.lora.dropout": 0.05,
    "optimizer.stage": "finetune",
    "optimizer.learning_rate": 2e-4,
    "optimizer.projector_learning_rate": 2e-5,
  },
}
# What is not the paper's: LLaVA-1.5's finetune.sh, and stage 2 on quantised kernels.
PAPER["finetune_full"] = PAPER["finetune_lora"] | {
  "model.lora.rank": 0,
  "optimizer.stage": "finetune_full",
  "optimizer.learning_rate": 2e-5,
}
PAPER["finetune_qlora"] = PAPER["finetune_lora"] | {"model.quantize": "nf4"}
SHARED = {
  "optimizer.warmup_ratio": 0.03,
  "optimizer.weight_decay": 0.0,
  "model.dtype": "bfloat16",
  "model.frozen_dtype": "bfloat16",
}
LEARNS = {
  "pretrain": r"projector/",
  "finetune_lora": r"projector/|language_model/.*/lora_[ab]$",
  "finetune_full": r"(projector|language_model)/",
  "finetune_qlora": r"projector/|language_model/.*/lora_[ab]$",
}
SIZES = tuple(recipes.SIZES)
MESH = config_lib.MeshConfig(data=1, fsdp=4, tensor=2)


def recipe(name: str, options: str = "") -> config_lib.Config:
  return recipes.load(f"{REPOSITORY}/configs/{name}.py:{options}")


def value(config: Any, key: str) -> Any:
  return functools.reduce(getattr, key.split("."), config)


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_numbers(name: str) -> None:
  wanted = SHARED | PAPER[name]
  for size in SIZES:
    config = recipe(name, f"size={size}")
    assert {key: value(config, key) for key in wanted} == wanted


@pytest.mark.parametrize(("size", "billions"), [("7b", 6.738), ("13b", 13.016)])
def test_sizes_are_vicuna_s(size: str, billions: float) -> None:
  """The published counts of LLaMA-2 7B and 13B: 6,738,415,616 and 13,015,864,320."""
  config = recipe("pretrain", f"size={size},variant=none").model
  assert build.parameter_counts(config)["language_model"] / 1e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.parametrize("name", PAPER)
def test_an_unknown_size_lists_the_known_ones(name: str) -> None:
  with pytest.raises(config_lib.ConfigError, match="option size: unknown '70b'; known: 13b, 7b"):
    recipe(name, "size=70b")


def test_where_a_recipe_starts() -> None:
  """Stage 1 from base and tower, stage 2 from stage 1's run, which knows its own base."""
  first = recipe("pretrain", "size=13b,checkpoints=/c").init
  assert first.language_model == "/c/vicuna-13b-v1.5"
  assert first.vision_tower == f"/c/{recipes.TOWER}"
  second = recipe("finetune_lora", "init=runs/mine").init
  assert second == config_lib.InitConfig(checkpoint="runs/mine")
  assert recipe("finetune_lora", "init=").init.language_model == "checkpoints/vicuna-7b-v1.5"


def abstract_step(config: config_lib.Config, mesh: Any) -> tuple[Any, Any, tuple[Any, ...]]:
  """The jitted step of the loop, its state's shardings, and its arguments as shapes."""
  trainable, frozen = jax.eval_shape(
    functools.partial(state.split, config=config), build.abstract(config.model)
  )
  tx = optimizer.build(config.optimizer, config.train.steps, list(trainable))
  start = jax.eval_shape(functools.partial(state.start, tx=tx), trainable, frozen)
  shardings = sharding.shardings(start, mesh)
  placed = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), start, shardings
  )
  rows = NamedSharding(mesh, mesh_lib.BATCH)
  shape = (config.train.batch_size, config.data.row_length)
  side = config.model.tower.image_size
  kinds = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "weights": jnp.float32,
    "positions": jnp.int32,
    "segments": jnp.int32,
    "slots": jnp.int32,
  }
  batch = {k: jax.ShapeDtypeStruct(shape, kind, sharding=rows) for k, kind in kinds.items()}
  images = (shape[0], config.data.images_per_row, side, side, 3)
  batch["images"] = jax.ShapeDtypeStruct(images, jnp.float32, sharding=rows)
  rng = jax.eval_shape(lambda: jax.random.key(0))
  rng = jax.ShapeDtypeStruct(rng.shape, rng.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
  step = setup.compile_step(build.model(config.model), tx, config, shardings)
  return step, start, (placed, batch, rng)


# Rows differ in the projector, which learns in both stages: what a recipe has beyond the first rows is slow.
STEPS = [
  pytest.param(name, variant, marks=[pytest.mark.slow] if i > 2 else [])
  for name in PAPER
  for i, variant in enumerate(VARIANTS)
]


@pytest.mark.parametrize(("name", "variant"), STEPS)
def test_every_variant_makes_a_step_of_shapes(name: str, variant: str) -> None:
  """The state that the step gives is the state that it takes; nothing is computed."""
  config = recipe(name, f"variant={variant}")
  mesh = mesh_lib.create(MESH, config.train.batch_size)
  with jax.set_mesh(mesh):
    step, start, arguments = abstract_step(config, mesh)
    after, metrics = jax.eval_shape(step, *arguments)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), start
  )
  assert metrics["loss"].shape == ()
  learning = {path for path in {**start.trainable, **start.frozen} if re.match(LEARNS[name], path)}
  assert set(start.trainable) == learning
  adapters = [path for path in learning if "/lora_" in path]
  assert len(adapters) == 14 * bool(config.model.lora.rank)  # a and b of the seven linear layers
  spatial = spatial_token_count(variant, build.patch_grid(config.model))
  patch_mlp = 4  # two kernels, two biases
  assert (sum(path.startswith("projector/") for path in learning) > patch_mlp) == bool(spatial)


PODS = (REPOSITORY / "docs" / "pods.md").read_text()
SIZE = re.compile(
  r"^\| (stage .*), 7B / 13B, `(\w+)` \| ([\d,]+) M / ([\d,]+) M \| ([\d.]+) / ([\d.]+) GB \|$",
  re.M,
)
STAGES = {"stage 1": "pretrain", "stage 2 with LoRA": "finetune_lora"}


@pytest.mark.parametrize("line", SIZE.findall(PODS), ids=lambda line: f"{line[0]} {line[1]}")
def test_what_learns_and_what_a_checkpoint_takes(line: tuple[str, ...]) -> None:
  """The table by which docs/pods.md sizes the disk, from shapes."""
  stage, variant, *figures = line
  found = []
  for size in SIZES:
    config = recipe(STAGES[stage], f"size={size},variant={variant}")
    trainable, frozen = jax.eval_shape(
      functools.partial(state.split, config=config), build.abstract(config.model)
    )
    tx = optimizer.build(config.optimizer, config.train.steps, list(trainable))
    start = jax.eval_shape(functools.partial(state.start, tx=tx), trainable, frozen)
    saved = jax.tree.leaves((start.trainable, start.opt_state))
    found.append(
      (sum(x.size for x in trainable.values()), sum(x.size * x.dtype.itemsize for x in saved))
    )
  (small, small_bytes), (large, large_bytes) = found
  assert figures == [
    f"{small / 1e6:,.0f}",
    f"{large / 1e6:,.0f}",
    f"{small_bytes / 1e9:.1f}",
    f"{large_bytes / 1e9:.1f}",
  ]


def test_the_table_of_sizes_is_found() -> None:
  assert len(SIZE.findall(PODS)) == PODS.count("7B / 13B, `") == 3


def lower(name: str, options: str) -> str:
  config = recipe(name, options)
  mesh = mesh_lib.create(MESH, config.train.batch_size)
  with jax.set_mesh(mesh):
    step, _, arguments = abstract_step(config, mesh)
    return step.lower(*arguments).as_text()


@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("pretrain", "size=13b"),
    ("finetune_lora", ""),
    ("finetune_full", ""),
    ("finetune_qlora", ""),
    ("finetune_qlora", "kernels=int8,variant=none"),
  ],
)
def test_the_step_lowers(name: str, options: str) -> None:
  text = lower(name, options)
  config = recipe(name, options)
  rows, length = config.train.batch_size, config.data.row_length
  assert f"tensor<{rows}x{length}xi32>" in text
  assert f"{rows}x{length}x{config.model.language_model.vocab_size}x" not in text  # no full logits
  assert '"data", "fsdp"' in text  # the batch is divided as mesh.BATCH says


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PAPER)
def test_every_step_lowers(name: str, size: str, variant: str) -> None:
  assert "dot_general" in lower(name, f"size={size},variant={variant}")


def test_every_recipe_of_the_paper_is_tested_here() -> None:
  uses = {
    p.stem for p in Path(REPOSITORY, "configs").glob("*.py") if "recipes.llava" in p.read_text()
  }
  assert uses == set(PAPER)
