"""The FLOP formula against XLA's own count, and against arithmetic by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.models import build, flops
from llava_sp_jax.models.projector import VARIANTS
from llava_sp_jax.training import optimizer, state, step
from tests.every_variant import model as table_model

BATCH, LENGTH = 2, 96
# XLA also counts what is no matmul (norms, softmax, rotary, activations, the loss). At these widths
# that is 1.3 to 2.7% of the step, and less on a wide model.
ABOVE = 0.04


def trainable(stage: str) -> Any:
  return lambda path: optimizer.group_of(path, stage) != optimizer.FROZEN


def wide(variant: str, rank: int) -> config_lib.ModelConfig:
  """Small, but wide enough that matmuls dominate; nothing is scanned, nothing recomputed."""
  return config_lib.ModelConfig(
    tower=config_lib.TowerConfig(
      image_size=48, patch_size=8, width=128, layers=3, heads=4, mlp_width=512
    ),
    language_model=config_lib.LanguageModelConfig(
      vocab_size=512, width=192, layers=2, heads=4, kv_heads=2, head_dim=48, mlp_width=512
    ),
    projector=config_lib.ProjectorConfig(variant=variant, token_width=128),
    lora=config_lib.LoraConfig(rank=rank, dropout=0.0),
    dtype="float32",
    frozen_dtype="float32",
    scan_unroll=8,
    remat="none",
  )


def counted(config: config_lib.Config) -> float:
  """XLA's FLOPs of loss and gradients for one tiny batch."""
  module = build.model(config.model)
  trainable, frozen = jax.eval_shape(lambda p: state.split(p, config), build.abstract(config.model))
  ids = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32)
  side = config.model.tower.image_size
  batch = dict.fromkeys(("tokens", "targets", "positions", "segments", "slots"), ids)
  batch["weights"] = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.float32)
  batch["images"] = jax.ShapeDtypeStruct((BATCH, 1, side, side, 3), jnp.float32)

  def loss(trainable: Any, frozen: Any, batch: Any) -> Any:
    return step.loss_and_counts(module, state.join(trainable, frozen), batch, LENGTH)[0]

  lowered = jax.jit(jax.grad(loss)).lower(trainable, frozen, batch)
  return lowered.compile().cost_analysis()["flops"]


@pytest.mark.parametrize(
  ("stage", "variant", "rank"),
  [
    ("finetune", "cropping", 16),
    ("pretrain", "pooling", 0),
    ("finetune", "pooling_multiscale_dfi", 16),
    ("pretrain_all", "none", 0),
  ],
)
def test_the_formula_counts_what_xla_counts(stage: str, variant: str, rank: int) -> None:
  config = config_lib.Config(
    model=wide(variant, rank), optimizer=config_lib.OptimizerConfig(stage=stage)
  )
  costs = flops.costs(config.model, trainable(stage))
  # XLA's attention computes the masked half as well
  ours = costs.step(BATCH * LENGTH, BATCH * LENGTH**2, BATCH)
  xla = counted(config)
  assert ours < xla < (1 + ABOVE) * ours


def test_a_frozen_7b_by_hand() -> None:
  """6.6 G frozen matmul parameters at 4 each, 320 M of LoRA at 6, 12 channels of attention."""
  config = config_lib.ModelConfig(lora=config_lib.LoraConfig(rank=128))
  text = config.language_model
  costs = flops.costs(config, trainable("finetune"))
  layer = 4 * text.width**2 + 3 * text.width * text.mlp_width
  adapters = 128 * (4 * 2 * text.width + 3 * (text.width + text.mlp_width))
  head = text.vocab_size * text.width
  assert costs.position == 4 * (32 * layer + head) + 6 * 32 * adapters
  assert costs.pair == 12 * 32 * 4096
  # the tower forward only, 23 of 24 blocks: about 0.36 TFLOP; kernels that read it 4 each
  assert costs.image == pytest.approx(0.41e12, rel=0.1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_costs(variant: str) -> None:
  costs = flops.costs(table_model(variant, rank=4), trainable("finetune"))
  frozen = flops.costs(table_model(variant, rank=4), lambda path: False)
  assert min(dataclasses.astuple(frozen)) > 0
  assert costs.image > frozen.image
  assert costs.position > frozen.position


def test_unknown_parameters_are_an_error() -> None:
  with pytest.raises(KeyError, match="gone/kernel"):
    flops._uses("projector/gone/kernel", flops._Sizes(1, 1, VARIANTS["cropping"], (1,), 1))


def by_hand(variant: str, tower: bool) -> float:
  """FLOPs of one image: 48 pixels in patches of 8, width 128, two of three blocks, 4 times as wide."""
  patches, width = 36, 128
  tokens, blocks = patches + 1, 2
  kernels = patches * 8 * 8 * 3 * width  # of patches: nothing below it wants a gradient
  inner = tokens * blocks * (4 * width**2 + 2 * width * 4 * width)
  attention = blocks * tokens**2 * width * 2  # scores and weighted values
  total = 2 * (kernels + inner + attention) + tower * (2 * kernels + 4 * inner + 4 * attention)
  projector = patches * 128 * 192, patches * 192 * 192
  total += projector[0] * (6 if tower else 4) + projector[1] * 6
  for side in (1, 2, 3, 4, 5, 6) if variant == "pooling" else ():
    total += side**2 * 128 * 128 * (6 if tower else 4)
  return total + (6 * 6 * 128 * 192 if variant == "pooling" else 0)


@pytest.mark.parametrize("variant", ["none", "pooling"])
@pytest.mark.parametrize("stage", ["pretrain", "pretrain_tower", "finetune", "pretrain_all"])
def test_an_image_by_hand(stage: str, variant: str) -> None:
  """A frozen tower is computed once; a trainable one costs three times its attention as well."""
  config = wide(variant, 4 if stage == "finetune" else 0)
  found = flops.costs(config, trainable(stage)).image
  assert found == by_hand(variant, tower=stage in ("pretrain_tower", "pretrain_all"))


@pytest.mark.parametrize("tied", [False, True])
def test_a_position_and_a_pair_by_hand(tied: bool) -> None:
  """192 wide, two layers, 4 heads of 48 over 2 key heads, mlp 512, 512 words; adapters of rank 4."""
  config = wide("none", 4)
  text = dataclasses.replace(config.language_model, tie_embeddings=tied)
  config = dataclasses.replace(config, language_model=text)
  kernels = 2 * (192 * 192 * 2 + 192 * 96 * 2 + 3 * 192 * 512)
  adapters = 2 * 4 * (4 * 192 + 2 * (192 + 96) + 3 * (192 + 512))
  head = 192 * 512
  frozen = flops.costs(config, trainable("finetune"))
  assert frozen.position == 4 * (kernels + head) + 6 * adapters
  full = flops.costs(config, trainable("finetune_full"))
  assert full.position == 6 * (kernels + head + adapters)
  assert frozen.pair == full.pair == 12 * 2 * 4 * 48
