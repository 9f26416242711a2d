"""Bounds every number of a config, and checks a config before any work begins.

Names of templates, stages and variants are checked where their tables are. These bounds are those
of training; a saved config is read without them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from llava_sp_jax import config as config_lib

COLORS = 3  # channels of a pixel
DTYPES = ("float32", "bfloat16", "float16")  # of activations and parameters
MOST = (1 << 31) - 1  # the largest integer: steps and positions are counted in 32 bits


@dataclasses.dataclass(frozen=True)
class Limit:
  """Holds an interval of numbers, from `low` to `high`.

  `open_ends` names the end that does not belong to it: "", "low" or "high".
  """

  low: float = -math.inf
  high: float = math.inf
  open_ends: str = ""

  @property
  def most(self) -> float:
    """Returns the largest integer that the interval accepts; 2^31 - 1 if it has no `high`."""
    return MOST if self.high == math.inf else self.high

  def holds(self, value: float) -> bool:
    """Returns whether a number is finite and lies in the interval.

    A Python int must also not exceed the property `most` in magnitude.
    """
    above = value > self.low if self.open_ends == "low" else value >= self.low
    below = value < self.high if self.open_ends == "high" else value <= self.high
    within = abs(value) <= self.most if isinstance(value, int) else math.isfinite(value)
    return within and above and below

  def __str__(self) -> str:
    parts = []
    if self.low > -math.inf:
      parts.append(f"{'above' if self.open_ends == 'low' else 'at least'} {_shown(self.low)}")
    if self.high < math.inf:
      parts.append(f"{'below' if self.open_ends == 'high' else 'at most'} {_shown(self.high)}")
    return " and ".join(parts) or "a finite number"


COUNT, NATURAL, POSITIVE = Limit(low=1), Limit(low=0), Limit(low=0, open_ends="low")
SHARE = Limit(0, 1, "high")
# Bounds of values that size lists, arrays or threads of a host. A larger one is a typing error,
# which would fill the memory before any message.
MANY, WORKERS = Limit(1, 1 << 20), Limit(1, 1 << 10)

# (regex over keys, limit of their numbers); the first match wins, and every key must match.
LIMITS: tuple[tuple[str, Limit], ...] = (
  (r"model\.tower\.select_layer", Limit()),
  (r"model\.lora\.rank", NATURAL),
  (r"model\.lora\.alpha", POSITIVE),
  (r"model\.lora\.dropout", SHARE),
  (r"model\.language_model\.rope_scaling\.factor", POSITIVE),
  (r"model\.language_model\.rope_scaling\.", NATURAL),
  (r"model\.language_model\.(sliding_window|window_from_layer)", NATURAL),
  (r"model\..*\.(rope_theta|norm_eps)", POSITIVE),
  (r"model\..*\.initializer_range", NATURAL),
  (r"model\.language_model\.max_positions", COUNT),
  (r"model\.", Limit(1, 1 << 24)),
  (r"data\.processes", Limit(0, WORKERS.high)),
  (r"data\.threads", WORKERS),
  (r"data\.(row_length|grid_pinpoints|bucket_lengths)", MANY),
  (r"data\.(turns_per_row|images_per_row|samples_per_row)", NATURAL),
  (r"data\.samples_per_batch", Limit(0, MANY.high)),
  (r"data\.validation_fraction", SHARE),
  (r"data\.image_std", POSITIVE),
  (r"data\.image_mean", Limit()),
  (r"data\.", COUNT),
  (r"optimizer\.(b1|b2)", SHARE),
  (r"optimizer\.warmup_ratio", Limit(0, 1)),
  (r"optimizer\.(eps|clip_norm)", POSITIVE),
  (r"optimizer\.", NATURAL),
  (r"train\.seed", Limit(0, 2**32 - 1)),
  (r"train\.batch_size", MANY),
  (r"train\.(epochs|peak_tflops|validate_every|stall_seconds)", NATURAL),
  (r"train\.", COUNT),
  (r"evaluate\.(every|limit)", NATURAL),
  (r"evaluate\.batch_size", MANY),
  (r"evaluate\.", COUNT),
  (r"mesh\.slices", NATURAL),
  (r"mesh\.", Limit(low=-1)),
)


def check(config: config_lib.Config) -> None:
  """Checks all numbers of a config, the names of dtypes, and sizes that depend on each other.

  Raises: ConfigError with every number outside its limit, and every other problem.
  """
  problems = [
    f"{key}: expected {limit}{_most(limit, value)}, found {value!r:.40}"
    for key, value in numbers(config_lib.to_dict(config))
    if not (limit := limit_of(key)).holds(value)
  ]
  tower, heads = config.model.tower, config.model.language_model.head_dim
  if not -tower.layers - 1 <= tower.select_layer <= tower.layers:
    problems.append(
      f"model.tower.select_layer: expected {-tower.layers - 1} to {tower.layers}, as "
      f"the tower has {tower.layers} layers, found {tower.select_layer}"
    )
  if heads % 2:
    problems.append(f"model.language_model.head_dim: expected an even number, found {heads}")
  for name in ("dtype", "frozen_dtype"):
    if (found := getattr(config.model, name)) not in DTYPES:
      problems.append(f"model.{name}: expected one of {', '.join(DTYPES)}, found {found!r:.40}")
  for name in ("image_mean", "image_std"):
    if len(found := getattr(config.data, name)) != COLORS:
      problems.append(f"data.{name}: expected {COLORS} numbers, found {len(found)}")
  if problems:
    raise config_lib.ConfigError("; ".join(problems))


def limit_of(key: str) -> Limit:
  """Returns the limit for the number at `key`, such as "train.steps"."""
  return next(limit for pattern, limit in LIMITS if re.match(pattern, key))


def numbers(values: Any, key: str = "") -> Iterator[tuple[str, float]]:
  """Yields (key, number) for all numbers in nested dictionaries, also for each in a list.

  `key` is the prefix of the keys.
  """
  if isinstance(values, dict):
    for name, value in values.items():
      yield from numbers(value, f"{key}.{name}" if key else name)
  elif isinstance(values, list | tuple):
    for value in values:
      yield from numbers(value, key)
  elif isinstance(values, int | float) and not isinstance(values, bool):
    yield key, values


def _shown(end: float) -> str:
  """Formats an end of an interval; an integer with all of its digits."""
  return f"{end:,.0f}" if float(end).is_integer() else f"{end:g}"


def _most(limit: Limit, value: float) -> str:
  beyond = isinstance(value, int) and value > limit.most and limit.high == math.inf
  return f", at most {limit.most:,.0f}" if beyond else ""
