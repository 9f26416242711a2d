"""Packed batches: measured, read and sought; damage after measuring; the same for any hosts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax.batch import BRANCHES
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import pipeline
from llava_sp_jax.data.packing import PACKINGS
from llava_sp_jax.data.quarantine import Quarantine
from tests.conftest import ConfigMaker
from tests.data.mixed import COUNT, SIZES, TILE, assert_same, held, make, mixed_config


@pytest.fixture
def config(tiny_config: ConfigMaker, tmp_path: Path) -> config_lib.Config:
  return mixed_config(tiny_config, tmp_path)


def packed_as(config: config_lib.Config, name: str) -> config_lib.DataConfig:
  samples = 5 if PACKINGS[name].counted else 0
  return dataclasses.replace(config.data, packing=name, samples_per_batch=samples)


def test_a_packed_row_is_its_samples_rows(config: config_lib.Config) -> None:
  """Every sample of every row is found in it as it is alone, but for segment and slots."""
  alone = make(dataclasses.replace(config.data, packing="none"), batch_size=COUNT)
  single = next(alone)
  places = {samples[0].sample: i for i, samples in enumerate(held(single))}
  packed = make(config.data, batch_size=1)
  rows, seen = len(packed.stream.epoch(0)), []
  assert rows < COUNT / 2
  for _ in range(rows):
    batch = next(packed)
    at = tile = 0
    for number, (epoch, index, trained, _) in enumerate(held(batch)[0], 1):
      row = places[index]
      length = int((single["segments"][row] > 0).sum())
      tiles = int(single["images"][row].any(axis=(1, 2, 3)).sum())
      part = slice(at, at + length)
      for name in ("tokens", "positions", "weights"):
        wanted = single[name][row][:length]
        np.testing.assert_array_equal(batch[name][0][part], wanted, err_msg=name)
      learned = single["weights"][row][:length] > 0
      targets = batch["targets"][0][part][learned]
      np.testing.assert_array_equal(targets, single["targets"][row][:length][learned])
      assert set(batch["segments"][0][part] // BRANCHES) == {number}
      newline = config.data.images_per_row * TILE.tokens
      slots = single["slots"][row][:length]
      moved = np.where((slots >= 0) & (slots < newline), slots + tile * TILE.tokens, slots)
      np.testing.assert_array_equal(batch["slots"][0][part], moved)
      pictures = batch["images"][0][tile : tile + tiles]
      np.testing.assert_array_equal(pictures, single["images"][row][:tiles])
      at, tile = at + length, tile + tiles
      seen.append(index)
      assert (epoch, trained) == (0, True)
    assert not batch["segments"][0][at:].any()
    assert not batch["weights"][0][at:].any()
    assert not batch["images"][0][tile:].any()
  assert sorted(seen) == list(range(COUNT))


@pytest.mark.parametrize("packing", PACKINGS)
def test_any_number_of_hosts_makes_the_same_batches(
  config: config_lib.Config, packing: str
) -> None:
  data = dataclasses.replace(packed_as(config, packing), turns_per_row=2)
  one = make(data)
  wanted = [next(one) for _ in range(6)]
  for hosts in (2, 4):
    parts = [make(data, rows=share) for share in np.array_split(np.arange(4), hosts)]
    for batch in wanted:
      mine = [next(part) for part in parts]
      whole = {k: np.concatenate([m[k] for m in mine]) for k in batch if k != pipeline.SAMPLES}
      assert_same({**whole, pipeline.SAMPLES: [r for m in mine for r in held(m)]}, batch)


@pytest.mark.parametrize("packing", PACKINGS)
def test_seeking_any_step_is_reading_up_to_it(config: config_lib.Config, packing: str) -> None:
  """Over several epochs, with draws of turns and augmentation of an epoch's own."""
  data = dataclasses.replace(
    packed_as(config, packing), turns_per_row=2, image_aspect="pad", augment="mirror_shift"
  )
  unbroken = make(data, batch_size=2)
  wanted = [next(unbroken) for _ in range(12)]
  assert {held(b)[0][0].epoch for b in wanted} >= {0, 1}
  other = make(data, batch_size=2)
  for step in (7, 0, 11, 3):
    other.seek(step)
    assert other.position == step
    assert_same(next(other), wanted[step])
  state = other.get_state()
  fresh = make(data, batch_size=2)
  fresh.set_state(state)
  assert_same(next(fresh), wanted[4])


def test_what_is_unreadable_later_leaves_its_place_empty(
  config: config_lib.Config, tmp_path: Path
) -> None:
  quarantine = Quarantine(tmp_path / "quarantine.jsonl")
  whole = next(make(config.data, batch_size=1))
  packed = make(config.data, batch_size=1, quarantine=quarantine)
  assert quarantine.count == 0
  source = json.loads(Path(config.data.path).read_text())
  broken = next(h.sample for h in held(whole)[0] if source[h.sample].get("image"))
  names = source[broken]["image"]
  name = names if isinstance(names, str) else names[0]
  (tmp_path / name).write_bytes(b"no picture any more")
  packed.seek(0)  # nothing that was read ahead
  batch = next(packed)
  lost = {h.sample for h in held(batch)[0] if not h.trained}
  assert broken in lost
  assert quarantine.count >= len(lost)
  assert [h.sample for h in held(batch)[0]] == [h.sample for h in held(whole)[0]]
  left = len(held(batch)[0]) - len(lost)
  assert len(set(batch["segments"][0] // BRANCHES) - {0}) == left
  assert batch["weights"].sum() < whole["weights"].sum()


def test_a_picture_that_grew_costs_its_sample_not_the_row(
  config: config_lib.Config, tmp_path: Path
) -> None:
  packed = make(config.data, batch_size=1, folder=tmp_path / "run")
  for i in range(len(SIZES)):
    Image.new("RGB", (48, 48), "red").save(tmp_path / f"{i}.png")  # five tiles each
  packed.seek(0)
  rows = [next(packed) for _ in range(len(packed.stream.epoch(0)))]
  lost = [h for batch in rows for h in held(batch)[0] if not h.trained]
  assert lost
  assert all(batch["images"].any(axis=(2, 3, 4)).sum() <= 12 for batch in rows)


def test_an_unknown_packing_lists_the_known(config: config_lib.Config) -> None:
  with pytest.raises(ConfigError, match="known: balanced, buckets, first_fit, none"):
    make(dataclasses.replace(config.data, packing="best"))
