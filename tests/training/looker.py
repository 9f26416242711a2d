"""A step that only looks, for tests of what is around it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.training import measure
from tests.conftest import ConfigMaker

COUNTS = (
  "loss",
  "right",
  "image_loss",
  "count",
  "image_count",
  "positions",
  "pairs",
  "image_positions",
)


@dataclasses.dataclass
class Looker:
  """In place of the compiled step: remembers its arguments, calls `does(step)`, learns nothing."""

  seen: list[tuple[int, Any, Any]] = dataclasses.field(default_factory=list)
  does: Callable[[int], None] = lambda number: None

  def lower(self, *_: Any) -> Looker:
    return self

  def compile(self) -> Looker:
    return self

  def __call__(self, state: Any, batch: Any, rng: Any) -> Any:
    number = int(state.step)
    key = jax.random.key_data(rng).tolist()
    self.seen.append((number, key, np.asarray(batch["tokens"]).tolist()))
    self.does(number + 1)
    sums = dict.fromkeys(COUNTS, jnp.float32(1 + number))
    metrics = measure.report(sums, {p: jnp.zeros(1) for p in state.trainable})
    return state.replace(step=state.step + 1), {**metrics, "nonfinite": jnp.float32(0)}


def config(tiny_config: ConfigMaker, **train: Any) -> config_lib.Config:
  values = {"steps": 5, "save_every": 2, "keep": 9, "preflight": False, "sinks": ()}
  return tiny_config("pretrain", "none", train={**values, **train})


def logged(folder: Path) -> list[int]:
  return [json.loads(x)["step"] for x in (folder / "metrics.jsonl").read_text().splitlines()]
