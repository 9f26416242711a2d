"""Every number of a config has a limit, which our recipes keep and which training looks at first."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import cli, limits
from llava_sp_jax import config as config_lib
from llava_sp_jax.training import loop
from tests.conftest import ConfigMaker

WRONG = {
  "train.steps": -4, "train.log_every": 0, "train.save_every": 0, "train.keep": 0,
  "train.batch_size": -8, "train.seed": -1, "train.accumulate": 0, "train.peer_seconds": 0,
  "optimizer.learning_rate": math.nan, "optimizer.clip_norm": 0.0, "optimizer.b2": 1.0,
  "optimizer.warmup_ratio": 1.5, "data.row_length": 0, "data.validation_fraction": 1.0,
  "data.image_std": (0.1, 0.0, 0.1), "data.threads": -1, "model.lora.alpha": math.inf,
  "model.lora.dropout": 1.0, "model.tower.width": 0, "model.language_model.norm_eps": 0.0,
  "mesh.tensor": -2, "evaluate.batch_size": 0,
}  # fmt: skip
# Each would take all memory of a host, or end in a traceback of a library's.
TOO_MANY = {
  "train.batch_size": 1 << 30, "data.row_length": (1 << 31) - 1, "data.processes": 100_000,
  "evaluate.batch_size": 1 << 30, "model.language_model.vocab_size": 1 << 30,
  "model.tower.select_layer": 9, "model.language_model.head_dim": 7,
}  # fmt: skip


def changed(config: config_lib.Config, key: str, value: object) -> config_lib.Config:
  """`config` with one value, whatever it is."""
  values = config_lib.to_dict(config)
  *groups, name = key.split(".")
  place = values
  for group in groups:
    place = place[group]
  place[name] = value
  return config_lib.from_dict(values)


def test_every_number_has_a_limit_that_holds_for_its_default() -> None:
  numbers = list(limits.numbers(config_lib.to_dict(config_lib.Config())))
  assert len({key for key, _ in numbers}) > 60
  assert [key for key, value in numbers if not limits.limit_of(key).holds(value)] == []
  for pattern, _ in limits.LIMITS:
    assert any(re.match(pattern, key) for key, _ in numbers), pattern


@pytest.mark.parametrize(("key", "value"), [*WRONG.items(), *TOO_MANY.items()])
def test_a_number_beyond_its_limit_is_named(
  tiny_config: ConfigMaker, tmp_path: Path, key: str, value: Any
) -> None:
  with pytest.raises(config_lib.ConfigError, match=rf"^{re.escape(key)}: expected .*, found .*$"):
    loop.train(changed(tiny_config(), key, value), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_all_are_named_at_once_by_the_command_before_anything_is_made(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  code = cli.main(
    [
      "train",
      "--config=easy_vqa",
      f"--workdir={tmp_path / 'run'}",
      "--config.train.steps=-4",
      "--config.train.log_every=0",
    ]
  )
  assert code == 1
  assert capsys.readouterr().err == (
    "llava-sp train: train.steps: expected at least 1, found -4; train.log_every: expected at least "
    "1, found 0\n"
  )
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [1 << 31, 10**400])
def test_a_whole_number_has_an_end(tiny_config: ConfigMaker, steps: int) -> None:
  with pytest.raises(
    config_lib.ConfigError, match=r"^train.steps: expected at least 1, at most 2,147,"
  ):
    limits.check(changed(tiny_config(), "train.steps", steps))
  limits.check(changed(tiny_config(), "train.steps", (1 << 31) - 1))


@pytest.mark.parametrize(
  ("key", "value", "said"),
  [
    (
      "model.dtype",
      "int7",
      "model.dtype: expected one of float32, bfloat16, float16, found 'int7'",
    ),
    ("model.frozen_dtype", "", "model.frozen_dtype: expected one of"),
    ("data.image_mean", (1.0,), "data.image_mean: expected 3 numbers, found 1"),
    ("data.image_std", (), "data.image_std: expected 3 numbers, found 0"),
  ],
)
def test_what_no_table_knows_is_looked_at_too(
  tiny_config: ConfigMaker, key: str, value: object, said: str
) -> None:
  with pytest.raises(config_lib.ConfigError, match=re.escape(said)):
    limits.check(changed(tiny_config(), key, value))


def test_a_value_has_no_keys(tiny_config: ConfigMaker) -> None:
  """`train.steps.x=1` was taken for the number of steps."""
  with pytest.raises(
    config_lib.ConfigError, match=r"config.train.steps is a value, and has no keys"
  ):
    config_lib.override(tiny_config(), {"config.train.steps.x": "1"})


def test_limits_say_what_they_are() -> None:
  said = [str(limit) for limit in (limits.COUNT, limits.POSITIVE, limits.SHARE, limits.Limit())]
  assert said == ["at least 1", "above 0", "at least 0 and below 1", "a finite number"]
  assert not limits.SHARE.holds(1)
  assert limits.SHARE.holds(0)
  assert not limits.POSITIVE.holds(0)
  assert dataclasses.replace(limits.SHARE, open_ends="").holds(1)
