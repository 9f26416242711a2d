"""Mixes sources by weight: what is read of each, in which order, and where a run goes on.

Each source has rows of its own, planned from its name and the seed alone, and a `Schedule` says of
which source each row of a batch is. So a source goes on where it stood when the mixture changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import threading
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax import json_files, storage
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import sources, validation_split
from llava_sp_jax.data.packing import PackedRow
from llava_sp_jax.data.packing import Stream as Rows
from llava_sp_jax.data.schedule import Schedule
from llava_sp_jax.data.source import Reader, Source
from llava_sp_jax.files import FormatError

KEY = "data.mixture"
ENTRY = {"path": str, "weight": json_files.NUMBER}
OPTIONAL = {"image_folder": str, "source": str}
EXPECTED = (
  'expected {"NAME": {"path": .., "weight": .., "image_folder": .., "source": ..}, ..}, of which '
  "the last two may be left out"
)
FINEST = 1 << 20  # of a weight, as a fraction


@dataclasses.dataclass(frozen=True)
class Part:
  """Holds one source of a run: all that is read, or one of a mixture, which then has a name."""

  data: config_lib.DataConfig  # the settings of the run, with the paths of this source
  source: Source
  members: Sequence[int]  # indices of the samples that belong to the split
  name: str = ""
  weight: Fraction = Fraction(1)  # how many times an epoch has each sample


def seed_of(seed: int, name: str) -> int:
  """Returns the seed of the order and the draws of a source, in a run of `seed`."""
  if not name:
    return seed
  return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7])


def open_parts(data: config_lib.DataConfig, read: Reader, split: str) -> list[Part]:
  """Opens all sources of a split: those of `data.mixture`, or the one that `data` names.

  Args:
    data: the data settings of the run.
    read: makes what the model needs of an image.
    split: TRAIN or VALIDATION of `validation_split`, in which all weights are 1.

  Raises: ConfigError, FileNotFoundError for data that cannot be opened; the message names the
    setting.
  """
  found = []
  for name, (own, weight) in each(data, split).items():
    key = f"{KEY}: {name}" if name else validation_split.path_key(data, split)
    source = sources.open_path(own.path, own.image_folder, read, own.source, key)
    try:
      members = validation_split.samples(own, split, len(source))
    except ConfigError:
      if not name or split == validation_split.TRAIN:
        raise
      continue  # too small a source for the share that is held out
    found.append(Part(own, source, members, name, weight))
  if not found:
    raise ConfigError(
      f"data.validation_fraction: {data.validation_fraction} leaves none of any source for "
      f"{split}; give another fraction, or data.validation_path"
    )
  return found


def each(
  data: config_lib.DataConfig, split: str
) -> dict[str, tuple[config_lib.DataConfig, Fraction]]:
  """Returns the settings and the weight of each source of a split by name; "" names a single one.

  Raises: ConfigError for a mixture that cannot be read.
  """
  of_split = validation_split.of_split(data, split)
  if not of_split.mixture:
    return {"": (of_split, Fraction(1))}
  if of_split.path:
    raise ConfigError(f"{KEY}, data.path: found both; --config.data.path= takes one back")
  once = split != validation_split.TRAIN
  return {
    name: (
      dataclasses.replace(of_split, mixture="", **entry),
      Fraction(1) if once else weight,
    )
    for name, (entry, weight) in entries(of_split.mixture).items()
  }


def entries(path: str) -> dict[str, tuple[dict[str, Any], Fraction]]:
  """Reads the file of a mixture: for each name, in order, settings of `data` and the weight.

  Paths in it start from its folder.

  Raises: ConfigError that names the file and the source.
  """
  place = storage.place(path)
  try:
    values = json_files.parse_object(place.read_bytes(), path)
  except FormatError as error:
    raise ConfigError(f"{KEY}: {error}; {EXPECTED}") from None
  except OSError as error:
    raise ConfigError(f"{KEY}: {path} cannot be read ({error.strerror}); {EXPECTED}") from None
  if not values:
    raise ConfigError(f"{KEY}: {path} names no source; {EXPECTED}")
  return {name: _entry(name, values[name], place) for name in sorted(values)}


def _entry(name: str, values: Any, file: Path) -> tuple[dict[str, Any], Fraction]:
  where = f"{KEY}: {file}, {name!r:.80}"
  if not name or not json_files.fits(values, ENTRY) or values.keys() - {*ENTRY, *OPTIONAL}:
    raise ConfigError(f"{where}: {EXPECTED}; found {values!r:.120}")
  if wrong := [key for key, kind in OPTIONAL.items() if not isinstance(values.get(key, ""), kind)]:
    raise ConfigError(f"{where}: {wrong[0]} is no text; {EXPECTED}")
  weight = values["weight"]
  exact = 0 if isinstance(weight, bool) else Fraction(str(weight)).limit_denominator(FINEST)
  if exact <= 0:
    raise ConfigError(f"{where}: weight {weight}; expected a number above 0: {MEANING}")
  settings = {key: values[key] for key in ("path", *OPTIONAL) if key in values}
  for key in ("path", "image_folder"):
    if settings.get(key) and not storage.remote(settings[key]):
      settings[key] = str(file.parent / settings[key])
  return {"source": sources.AUTO, **settings}, Fraction(exact)


MEANING = "how many times an epoch has each of its samples"


class Stream:
  """Provides the endless sequence of rows of a mixture, by index; may be shared by threads.

  It is `packing.Stream` of several sources. Where whole batches are planned, all rows of a batch
  are of one source.
  """

  def __init__(self, parts: Sequence[Part], streams: Sequence[Rows], size: int):
    """Plans the first epoch of each source.

    `streams` are the rows of each part, and `size` how many rows follow each other: those of a
    batch where whole batches are planned, otherwise 1.
    """
    self._names = [part.name for part in parts]
    self._streams, self._size = streams, size
    shares = [
      part.weight * (len(stream.epoch(0)) // size)
      for part, stream in zip(parts, streams, strict=True)
    ]
    self._length = max(1, round(sum(shares))) * size
    whole = math.lcm(*(share.denominator for share in shares))
    units = [int(share * whole) for share in shares]
    self._units = [unit // math.gcd(*units) for unit in units]
    self._schedule = Schedule(self._units)
    self._first, self._read = 0, dict.fromkeys(self._names, 0)
    self._lock = threading.Lock()

  def epoch_rows(self) -> int:
    """Returns the rows of an epoch: of each source, its weight times the rows that it has."""
    return self._length

  def __getitem__(self, row: int) -> tuple[int, int, PackedRow]:
    """Returns (part, its epoch, row) of row `row`, from 0, since the start of training."""
    group, inside = divmod(row - self._first, self._size)
    with self._lock:
      part, rank = self._schedule[group]
    place = (self._read[self._names[part]] + rank) * self._size + inside
    return part, *self._streams[part][place]

  def state(self) -> dict[str, Any]:
    """Returns what `resume` needs, as values of JSON."""
    return {
      "first": self._first,
      "units": dict(zip(self._names, self._units, strict=True)),
      "read": dict(self._read),
    }

  def resume(self, known: Mapping[str, Any] | None, row: int) -> None:
    """Continues, at row `row`, what a stream with the state `known` has read before.

    If the mixture is the same, the order goes on. Otherwise a new order begins, in which each
    source goes on where it stood, also one that comes again. Without `known` all begin.
    """
    if not known:
      self._first, self._read = row, dict.fromkeys(self._names, 0)
      return
    if known["units"] == self.state()["units"]:
      self._first, self._read = known["first"], {**self._read, **known["read"]}
      return
    names = sorted(known["units"])
    counts = Schedule([known["units"][name] for name in names]).counts(
      (row - known["first"]) // self._size
    )
    read = dict(known["read"])
    for name, count in zip(names, counts, strict=True):
      read[name] += count
    self._first, self._read = row, {**self._read, **read}


def fingerprint(parts: Sequence[Part]) -> str:
  """Returns a hash of the samples of all sources, in hexadecimal digits."""
  if not parts[0].name:
    return parts[0].source.fingerprint()
  about = [(part.name, str(part.weight), part.source.fingerprint()) for part in parts]
  return hashlib.sha256(repr(about).encode()).hexdigest()


def table(parts: Sequence[Part]) -> dict[str, dict[str, str]]:
  """Returns the weight and the fingerprint of each source by name; {} without a mixture."""
  return {
    part.name: {"weight": str(part.weight), "samples": part.source.fingerprint()[:16]}
    for part in parts
    if part.name
  }


def differences(
  now: Mapping[str, Mapping[str, str]], known: Mapping[str, Mapping[str, str]]
) -> dict[str, list[str]]:
  """Compares two tables; returns lines by what differs, "data" (samples) or "mixture"."""
  found: dict[str, list[str]] = {"data": [], "mixture": []}
  for name in sorted({*now, *known}):
    if name not in known or name not in now:
      found["mixture"].append(f"{name} only {'here' if name in now else 'there'}")
      continue
    ours, theirs = now[name], known[name]
    if ours["samples"] != theirs["samples"]:
      found["data"].append(
        f"samples of {name} have fingerprint {ours['samples']} here, {theirs['samples']} there"
      )
    if ours["weight"] != theirs["weight"]:
      found["mixture"].append(f"{name} has weight {ours['weight']} here, {theirs['weight']} there")
  return {key: lines for key, lines in found.items() if lines}
