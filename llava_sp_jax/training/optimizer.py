"""Maps parameter paths to optimizer groups: what each stage trains, and at which rate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from llava_sp_jax import config as config_lib

FROZEN = "frozen"

# (regex over the path, group); the first match wins and every path must match. A group other
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
  # LLaVA's full fine-tuning (`finetune.sh`): projector and the whole decoder, one rate in both.
  "finetune_full": (
    (r"projector/", "projector"),
    (r"language_model/", "base"),
    (r"vision_tower/", FROZEN),
  ),
}
Rates = Callable[[int], dict[str, float]]
RATES = {"base": "learning_rate", "projector": "projector_learning_rate"}

# (regex over the path, whether weight decay applies); the first match wins. Biases and norms are
# excluded, as in the original's trainer (`get_parameter_names` without norm layers; no name with
# "bias").
DECAY: tuple[tuple[str, bool], ...] = ((r".*(bias|scale)$", False), (r".*", True))

MOMENT_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def group_of(path: str, stage: str) -> str:
  """Returns the optimizer group of the parameter at `path` in a stage: a key of RATES, or FROZEN.

  Raises: ConfigError for an unknown stage, KeyError for a path that no row matches.
  """
  for pattern, group in config_lib.lookup("optimizer.stage", stage, STAGES):
    if re.match(pattern, path):
      return group
  raise KeyError(f"no row of STAGES[{stage!r}] matches parameter {path!r}")


def decays(path: str) -> bool:
  """Returns whether weight decay applies to the parameter at `path`."""
  return next(value for pattern, value in DECAY if re.match(pattern, path))


def schedule(rate: float, steps: int, warmup_ratio: float, xp: Any = jnp) -> optax.Schedule:
  """Returns a function from the number of an update (from 0) to its learning rate.

  It rises from 0 over ceil(warmup_ratio * steps) updates, and falls to 0 as half a cosine.

  Args:
    rate: the largest learning rate.
    steps: updates of the whole run.
    warmup_ratio: share of them in the warm-up.
    xp: the array module, jax.numpy or numpy. numpy evaluates on the host, where a single process
      may call it alone.
  """
  warmup = math.ceil(warmup_ratio * steps)

  def value(count: Any) -> Any:
    rise = count / max(1, warmup)
    fall = 0.5 * (1 + xp.cos(xp.pi * (count - warmup) / max(1, steps - warmup)))
    return rate * xp.where(count < warmup, rise, xp.maximum(0.0, fall))

  return value


def rates(config: config_lib.OptimizerConfig, steps: int, paths: Iterable[str]) -> Rates:
  """Returns a host function from the number of an update (from 0) to {group: learning rate}.

  `steps` is the number of updates of the whole run. The groups are those of the parameters at
  `paths`.
  """
  ratio = config.warmup_ratio
  schedules = {
    group: schedule(getattr(config, RATES[group]), steps, ratio, np)
    for group in sorted({group_of(path, config.stage) for path in paths})
  }
  return lambda count: {group: float(rate(count)) for group, rate in schedules.items()}


def build(
  config: config_lib.OptimizerConfig, steps: int, paths: list[str]
) -> optax.GradientTransformation:
  """Builds AdamW with gradient clipping for a flat `{path: array}` tree of trainable parameters.

  `steps` is the number of updates of the whole run, `paths` are the keys of the tree.
  """
  moments = config_lib.lookup("optimizer.moment_dtype", config.moment_dtype, MOMENT_DTYPES)

  def adamw(rate: float) -> optax.GradientTransformation:
    return optax.adamw(
      schedule(rate, steps, config.warmup_ratio),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
      mask=lambda tree: {p: decays(p) for p in tree},
      mu_dtype=moments,
    )

  groups = {path: group_of(path, config.stage) for path in paths}
  rates = {g: getattr(config, RATES[g]) for g in sorted(set(groups.values()))}
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.multi_transform({g: adamw(rate) for g, rate in rates.items()}, groups),
  )
