"""Which parameters are trained at which rate, by a written table; AdamW, its schedule and clipping, written out."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from llava_sp_jax import config as config_lib
from llava_sp_jax.models import build
from llava_sp_jax.training import optimizer, state
from tests.conftest import ConfigMaker

# One parameter of every kind that has a rate of its own in some stage.
KINDS = {
  "tower": "vision_tower/layers/q_proj/kernel",
  "patches": "projector/fc1/kernel",
  "spatial": "projector/pool_0/kernel",
  "detail": "projector/detail_16/query/bias",
  "out": "projector/out/kernel",
  "newline": "projector/image_newline",
  "embedding": "language_model/token_embed/embedding",
  "kernel": "language_model/layers/q_proj/kernel",
  "norm": "language_model/layers/attn_norm/scale",
  "head": "language_model/lm_head/kernel",
  "lora_a": "language_model/layers/down_proj/lora_a",
  "lora_b": "language_model/layers/q_proj/lora_b",
}
PROJECTOR = dict.fromkeys(("patches", "spatial", "detail", "out", "newline"), "projector")
DECODER = ("embedding", "kernel", "norm", "head", "lora_a", "lora_b")
# What each stage trains, and at whose rate; all that is not here is frozen.
LEARNS: dict[str, dict[str, str]] = {
  "pretrain": PROJECTOR,
  "pretrain_tower": {**PROJECTOR, "tower": "projector"},
  "pretrain_all": {**PROJECTOR, "tower": "projector", **dict.fromkeys(DECODER, "base")},
  "finetune": {**PROJECTOR, "lora_a": "base", "lora_b": "base"},
  "finetune_full": {**PROJECTOR, **dict.fromkeys(DECODER, "base")},
}
KEYS = {"base": "learning_rate", "projector": "projector_learning_rate"}


def test_the_table_is_of_all_stages() -> None:
  assert LEARNS.keys() == optimizer.STAGES.keys()
  assert optimizer.RATES == KEYS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", LEARNS)
def test_groups_are_those_of_the_table(stage: str, kind: str) -> None:
  assert optimizer.group_of(KINDS[kind], stage) == LEARNS[stage].get(kind, "frozen")


@pytest.mark.parametrize("variant", ["cropping", "both", "register"])
@pytest.mark.parametrize("stage", LEARNS)
def test_whole_models_are_divided_by_their_parts(
  tiny_config: ConfigMaker, stage: str, variant: str
) -> None:
  """Every path of a real tree: by its first name, and by whether it is an adapter."""
  config = tiny_config(stage, variant, model={"image_newline": True})
  learned = {KINDS[k].split("/")[0]: v for k, v in LEARNS[stage].items() if "lora" not in k}
  adapters = LEARNS[stage].get("lora_a", "frozen")
  for path in flatten_dict(build.abstract(config.model), sep="/"):
    wanted = adapters if "lora_" in path else learned.get(path.split("/")[0], "frozen")
    assert optimizer.group_of(path, stage) == wanted, path


def rate_at(count: int, peak: float, steps: int, ratio: float) -> float:
  """The original's `get_cosine_schedule_with_warmup`: LambdaLR's factor of update `count`."""
  warmup = math.ceil(steps * ratio)
  if count < warmup:
    return peak * count / max(1, warmup)
  progress = (count - warmup) / max(1, steps - warmup)
  return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


@pytest.mark.parametrize(
  ("steps", "ratio"), [(10, 0.0), (10, 0.31), (7, 0.03), (1, 0.5), (40, 0.1)]
)
def test_the_schedule_written_out(steps: int, ratio: float) -> None:
  values = config_lib.OptimizerConfig(
    stage="finetune", learning_rate=0.5, projector_learning_rate=0.2, warmup_ratio=ratio
  )
  for xp in (np, jnp):
    schedule = optimizer.schedule(0.5, steps, ratio, xp)
    found = [float(schedule(count)) for count in range(steps + 1)]
    wanted = [rate_at(count, 0.5, steps, ratio) for count in range(steps + 1)]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-7)
  told = optimizer.rates(values, steps, [KINDS["spatial"], KINDS["lora_b"]])
  for count in range(steps + 1):
    assert told(count) == pytest.approx(
      {"base": rate_at(count, 0.5, steps, ratio), "projector": rate_at(count, 0.2, steps, ratio)},
      abs=1e-9,
    )


class AdamW:
  """Loshchilov and Hutter 2019, algorithm 2, behind clipping by the global norm; float64 loops."""

  def __init__(self, values: config_lib.OptimizerConfig, steps: int, params: dict[str, np.ndarray]):
    self.values, self.steps, self.count = values, steps, 0
    self.m = {p: np.zeros(x.shape) for p, x in params.items()}
    self.v = {p: np.zeros(x.shape) for p, x in params.items()}

  def update(self, params: dict[str, Any], grads: dict[str, Any]) -> dict[str, np.ndarray]:
    values, result = self.values, {}
    norm = math.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in grads.values()))
    factor = min(1.0, values.clip_norm / norm) if norm else 1.0
    for path, x in params.items():
      g = np.asarray(grads[path], np.float64) * factor
      x = np.asarray(x, np.float64)
      self.m[path] = values.b1 * self.m[path] + (1 - values.b1) * g
      self.v[path] = values.b2 * self.v[path] + (1 - values.b2) * g**2
      t = self.count + 1
      step = (self.m[path] / (1 - values.b1**t)) / (
        np.sqrt(self.v[path] / (1 - values.b2**t)) + values.eps
      )
      group = "base" if path.startswith("language_model/") else "projector"
      rate = rate_at(self.count, getattr(values, KEYS[group]), self.steps, values.warmup_ratio)
      decay = 0.0 if path.endswith(("bias", "scale")) else values.weight_decay
      result[path] = x - rate * (step + decay * x)
    self.count += 1
    return result


# An eps that matters, betas that are not the usual ones, rates that differ.
VALUES = config_lib.OptimizerConfig(
  stage="finetune_full",
  learning_rate=0.03,
  projector_learning_rate=0.01,
  warmup_ratio=0.3,
  weight_decay=0.2,
  b1=0.8,
  b2=0.95,
  eps=0.05,
  clip_norm=1.0,
)


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_updates_are_those_of_adamw(size: float) -> None:
  """Some steps whose gradients are clipped (10) or not (0.1), with both rates, and decay."""
  rng, steps = np.random.default_rng(0), 6
  shapes = {
    KINDS["kernel"]: (3, 2),
    KINDS["norm"]: (2,),
    KINDS["patches"]: (2, 4),
    KINDS["detail"]: (3,),
    KINDS["lora_b"]: (2, 2),
  }
  params = {p: np.asarray(rng.normal(size=s), np.float32) for p, s in shapes.items()}
  tx = optimizer.build(VALUES, steps, list(params))
  update, opt_state = jax.jit(tx.update), tx.init(params)
  hand = AdamW(VALUES, steps, {p: np.zeros(s) for p, s in shapes.items()})
  for number in range(steps):
    grads = {p: np.asarray(rng.normal(size=s) + number, np.float32) for p, s in shapes.items()}
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
    grads = {p: g * np.float32(size / norm) for p, g in grads.items()}
    wanted = hand.update(params, grads)
    updates, opt_state = update(grads, opt_state, params)
    params = {p: x + np.asarray(updates[p]) for p, x in params.items()}
    for path in params:
      np.testing.assert_allclose(params[path], wanted[path], rtol=2e-6, atol=1e-6, err_msg=path)
    if number:
      assert max(np.abs(u).max() for u in updates.values()) > 1e-4


@pytest.mark.parametrize("stage", ["finetune", "pretrain_all"])
def test_masters_are_float32_and_the_base_is_stored_as_asked(
  tiny_config: ConfigMaker, stage: str
) -> None:
  """Whatever the checkpoint was stored in; only quantised leaves keep their dtype."""
  config = tiny_config(stage, model={"frozen_dtype": "bfloat16"})
  shapes = flatten_dict(build.abstract(config.model), sep="/")
  given = unflatten_dict({p: np.zeros(s.shape, np.float16) for p, s in shapes.items()}, sep="/")
  trainable, frozen = state.split(given, config)
  assert {str(x.dtype) for x in trainable.values()} == {"float32"}
  assert {str(x.dtype) for x in frozen.values()} <= {"bfloat16"}
  assert trainable.keys() | frozen.keys() == shapes.keys()
  assert jax.tree.structure(state.join(trainable, frozen)) == jax.tree.structure(given)
