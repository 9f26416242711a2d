"""Computes the fingerprint of samples, which is the same in whatever format they are stored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llava_sp_jax.data import forms, kept

VERSION = 1  # of what is hashed
NO_SAMPLE = b"!"  # stands for all that is no sample: it trains nothing, whatever it is


class Fingerprint:
  """Hashes samples and their order; does not cover image files."""

  def __init__(self) -> None:
    self._hash = hashlib.sha256(f"llava-sp samples {VERSION}\n".encode())

  def add(self, sample: Any) -> None:
    """Adds the next sample, as a source returns it."""
    self._hash.update(written(sample) + b"\n")

  def hexdigest(self) -> str:
    """Returns the SHA-256 of all samples so far."""
    return self._hash.hexdigest()


def written(sample: Any) -> bytes:
  """Returns one line of JSON that is equal for samples that train alike.

  Leaves out keys without a value, which tables have in place of missing ones, and writes the names
  of images under one key. Bytes in place of a name are not covered.
  """
  if not isinstance(sample, dict):
    return NO_SAMPLE
  kept = {key: value for key, value in sample.items() if not _empty(value)}
  for key in forms.IMAGES:
    if key in kept:
      value = kept.pop(key)
      kept["images"] = [value] if isinstance(value, str | bytes) else value
  for key in forms.DIALOGUES:
    if isinstance(kept.get(key), list):
      kept[key] = [_turn(turn) for turn in kept[key]]
  try:
    return json.dumps(kept, sort_keys=True, default=_other).encode()
  except (ValueError, TypeError, RecursionError):
    return NO_SAMPLE


def _empty(value: Any) -> bool:
  return value is None or (isinstance(value, str | bytes | list) and not value)


def _turn(turn: Any) -> Any:
  if not isinstance(turn, dict):
    return turn
  return {key: value for key, value in turn.items() if value is not None}


def _other(value: Any) -> str:
  return type(value).__name__


class Samples(Protocol):
  """Provides samples by index, as `source.Source` does."""

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> Any: ...


def of(samples: Samples, path: str | Path, files: Sequence[Path]) -> str:
  """Returns the fingerprint of samples, from beside the data set `path` if they were read before.

  `files` are those that hold the samples: a change of their sizes or times means other samples.
  """
  name = f"content-{kept.key_of(VERSION, kept.stamps(files))}.npz"
  if known := kept.load(kept.beside(path) / name):
    return str(known["fingerprint"])
  result = Fingerprint()
  for index in range(len(samples)):
    result.add(samples[index])
  if len(samples) > kept.SMALL:
    kept.save_in(kept.beside(path), name, {"fingerprint": np.array(result.hexdigest())})
  return result.hexdigest()
