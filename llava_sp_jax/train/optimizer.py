"""What learns, and how fast: a table of regular expressions over parameter paths per stage."""

from __future__ import annotations

import math
import re
from typing import Any

import jax.numpy as jnp
import optax

from llava_sp_jax import config as config_lib

FROZEN = "frozen"

# (regex over the path, group); the first match wins and nothing may stay unmatched. A group other
# than FROZEN names a learning rate in RATES. Stage 1 trains the whole projector, the spatial tokens
# included; stage 2 trains adapters and projector (original: `llava_trainer.py`, `train.py`).
STAGES: dict[str, tuple[tuple[str, str], ...]] = {
  "pretrain": ((r"projector/", "projector"), (r"(vision_tower|language_model)/", FROZEN)),
  "pretrain_tower": ((r"(projector|vision_tower)/", "projector"), (r"language_model/", FROZEN)),
  "pretrain_all": (
    (r"(projector|vision_tower)/", "projector"),
    (r"language_model/", "base"),
  ),
  "finetune": (
    (r"language_model/.*/lora_[ab]$", "base"),
    (r"projector/", "projector"),
    (r"(vision_tower|language_model)/", FROZEN),
  ),
}
RATES = {"base": "learning_rate", "projector": "projector_learning_rate"}


def group_of(path: str, stage: str) -> str:
  """The group of a parameter. Raises: ConfigError for an unknown stage, KeyError for no match."""
  for pattern, group in config_lib.lookup("optimizer.stage", stage, STAGES):
    if re.match(pattern, path):
      return group
  raise KeyError(f"no row of STAGES[{stage!r}] matches parameter {path!r}")


def schedule(rate: float, steps: int, warmup_ratio: float) -> optax.Schedule:
  """Linear warm-up over ceil(ratio * steps) from 0, then half a cosine to 0."""
  warmup = math.ceil(warmup_ratio * steps)

  def value(count: Any) -> Any:
    rise = count / max(1, warmup)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * (count - warmup) / max(1, steps - warmup)))
    return rate * jnp.where(count < warmup, rise, jnp.maximum(0.0, fall))

  return value


def build(
  config: config_lib.Optimizer, steps: int, paths: list[str]
) -> optax.GradientTransformation:
  """AdamW for a flat `{path: array}` tree of the parameters that learn."""

  def adamw(rate: float) -> optax.GradientTransformation:
    return optax.adamw(
      schedule(rate, steps, config.warmup_ratio), b1=config.b1, b2=config.b2, eps=config.eps,
      weight_decay=config.weight_decay,
    )  # fmt: skip

  groups = {path: group_of(path, config.stage) for path in paths}
  rates = {g: getattr(config, RATES[g]) for g in sorted(set(groups.values()))}
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.multi_transform({g: adamw(rate) for g, rate in rates.items()}, groups),
  )
