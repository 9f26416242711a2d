"""Divides the samples into a training split and a validation split."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import ConfigError

TRAIN, VALIDATION = "train", "validation"


def of_split(data: config_lib.DataConfig, split: str) -> config_lib.DataConfig:
  """Returns the data settings of a split, "train" or "validation".

  The validation split has no augmentation, and reads `data.validation_path` if that is given.

  Raises: ConfigError for a validation split that is missing or given in two ways, and for a
    fraction outside [0, 1).
  """
  if not 0 <= data.validation_fraction < 1:
    raise ConfigError(
      f"data.validation_fraction: expected a share from 0 to below 1, found "
      f"{data.validation_fraction}"
    )
  if data.validation_path and data.validation_fraction:
    raise ConfigError("data.validation_path, data.validation_fraction: give one of the two")
  if split == TRAIN:
    return data
  if not data.validation_path and not data.validation_fraction:
    raise ConfigError(
      "train.validate_every: no validation split; give data.validation_path or "
      "data.validation_fraction"
    )
  data = dataclasses.replace(data, augment="none")
  if not data.validation_path:
    return data
  return dataclasses.replace(data, path=data.validation_path, mixture="")


def path_key(data: config_lib.DataConfig, split: str) -> str:
  """Returns the name of the setting that names a split's file, for messages."""
  own = split == VALIDATION and data.validation_path
  return "data.validation_path" if own else "data.path"


def samples(data: config_lib.DataConfig, split: str, count: int) -> Sequence[int]:
  """Returns the indices of the samples that belong to a split, of `count` samples in its file.

  A hash of its index decides about each sample. So the split is the same in every run and on any
  number of hosts, and a larger validation fraction only adds samples to the validation split.

  Raises: ConfigError when the split would be empty.
  """
  if not data.validation_fraction:
    return range(count)
  held = _hash(np.arange(count, dtype=np.uint64)) < data.validation_fraction
  chosen = np.flatnonzero(held if split == VALIDATION else ~held).tolist()
  if not chosen:
    raise ConfigError(
      f"data.validation_fraction: {data.validation_fraction} of {count} samples leaves none for "
      f"{split}; give another fraction, or data.validation_path"
    )
  return chosen


def _hash(x: np.ndarray) -> np.ndarray:
  """Hashes integers to [0, 1) uniformly: the finalizer of SplitMix64 (Steele et al. 2014)."""
  x = (x + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  x = x ^ (x >> np.uint64(31))
  return (x >> np.uint64(11)).astype(np.float64) / 2.0**53
