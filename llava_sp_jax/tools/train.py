"""llava-sp train: trains the stage that a config describes, or continues it."""

from __future__ import annotations

import dataclasses
from typing import Any

from llava_sp_jax import config as config_lib

USAGE = """usage: llava-sp train --config FILE[:OPTIONS] --workdir DIR [--config.GROUP.KEY=VALUE ...]

Trains until train.steps. The same command continues a run that was stopped or killed.

  --config FILE[:OPTIONS]  a file with get_config(OPTIONS), e.g. configs/easy_vqa.py:stage=pretrain
  --workdir DIR            the run: config.json, checkpoints/, metrics.jsonl, quarantine.jsonl
  --config.GROUP.KEY=VALUE replaces one value (GROUP may be nested: --config.model.tower.width=64)

example:
  llava-sp train --config configs/easy_vqa.py:stage=pretrain,row=cropping --workdir runs/pretrain \\
    --config.train.steps=200

keys and defaults:
"""


def keys(values: Any, prefix: str = "config") -> list[str]:
  """One line for each key of the config."""
  lines = []
  for field in dataclasses.fields(values):
    value = getattr(values, field.name)
    name = f"{prefix}.{field.name}"
    lines += keys(value, name) if dataclasses.is_dataclass(value) else [f"  --{name}={value!r}"]
  return lines


def read_config(argv: list[str]) -> tuple[config_lib.Config, str]:
  """--config with its overrides, and --workdir. Raises: ConfigError, FileNotFoundError."""
  from absl import flags
  from ml_collections import ConfigDict, config_flags

  holder = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=holder)
  flags.DEFINE_string("workdir", "", "run folder", flag_values=holder)
  try:
    left = holder(["train", *complete(argv)])[1:]
  except (flags.Error, AttributeError, KeyError, TypeError) as error:
    raise config_lib.ConfigError(str(error)) from None
  if left:
    raise config_lib.ConfigError(f"unexpected arguments: {' '.join(left)}")
  if holder.config is None or not holder.workdir:
    raise config_lib.ConfigError("give --config FILE and --workdir DIR; see llava-sp train --help")
  assert isinstance(holder.config, ConfigDict)
  return config_lib.from_dict(holder.config.to_dict()), holder.workdir


def complete(argv: list[str]) -> list[str]:
  """The arguments as they are; a config file that does not exist is named before absl tries it."""
  from pathlib import Path

  for i, argument in enumerate(argv):
    if argument.startswith("--config=") or argument == "--config":
      value = argument.partition("=")[2] or (argv[i + 1] if i + 1 < len(argv) else "")
      path = Path(value.partition(":")[0])
      if not path.is_file():
        raise FileNotFoundError(f"--config: no file {str(path)!r}")
  return argv


def main(argv: list[str]) -> None:
  if {"--help", "-h"} & set(argv):
    print(USAGE + "\n".join(keys(config_lib.Config())))
    return
  config, workdir = read_config(argv)
  from llava_sp_jax.train import loop

  result = loop.train(config, workdir)
  print(f"{workdir}: step {result.step} of {config.train.steps}, {result.seconds:.0f} s, "
        f"{result.quarantined} samples quarantined")  # fmt: skip
