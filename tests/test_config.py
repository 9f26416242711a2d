"""Unknown names and keys, wrong types, former policies, and numbers typed by a user."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import conversation, image, packing, samples, sources
from llava_sp_jax.models import build, cache
from llava_sp_jax.models.layers import ROPES
from llava_sp_jax.models.projector import VARIANTS
from llava_sp_jax.models.quantize import FORMATS
from llava_sp_jax.models.vit import TOWER_VARIANTS
from llava_sp_jax.training import optimizer
from tests.every_variant import model

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
  "model.cache": (
    lambda: build.model(dataclasses.replace(model("none"), cache="nope")),
    cache.FORMATS,
  ),
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
