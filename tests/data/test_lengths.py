"""Measuring before packing: what reading finds, kept and measured anew, with what it cannot use."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import lengths, sources
from llava_sp_jax.data import measured as measured_lib
from llava_sp_jax.data.anyres import Reader
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.data.usable import Usable
from tests.conftest import ConfigMaker
from tests.data.mixed import COUNT, TILE, assert_same, held, make, mixed_config


@pytest.fixture
def config(tiny_config: ConfigMaker, tmp_path: Path) -> config_lib.Config:
  return mixed_config(tiny_config, tmp_path)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_measuring_is_what_reading_finds(
  config: config_lib.Config, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
  monkeypatch.setattr(lengths, "CHUNK", 5)
  monkeypatch.setattr(lengths, "ALONE", 3)
  data = dataclasses.replace(config.data, packing="none", processes=processes)
  source = sources.LlavaJson(data.path, data.image_folder, Reader(data, TILE))
  measured = lengths.Lengths(
    source, Tokenizer(data.tokenizer), data, TILE, 0, Quarantine()
  ).measured(0)
  batch = next(make(data, batch_size=COUNT))
  for i, (sample,) in enumerate(held(batch)):
    assert measured.lengths[sample.sample] == (batch["segments"][i] > 0).sum()
    tiles = batch["images"][i].any(axis=(1, 2, 3)).sum()
    assert measured.tiles[sample.sample] == tiles
  assert not measured.errors
  assert measured.cut == 0


def test_a_pass_is_kept_and_its_bad_samples_named_again(
  config: config_lib.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  path = Path(config.data.path)
  path.write_text(json.dumps([*json.loads(path.read_text()), {"id": "bad", "image": "gone.png"}]))
  said: list[str] = []
  options = {"folder": tmp_path / "run", "say": said.append}
  first = next(make(config.data, **options))
  assert "measured 17 samples" in said[0]
  assert "1 cannot be used" in said[0]
  assert "rows in the first epoch" in said[1]
  files = list((tmp_path / "run").glob("lengths-*.npz"))
  assert len(files) == 1
  monkeypatch.setattr(lengths.Lengths, "_measure", lambda *_: pytest.fail("measured again"))
  quarantine = Quarantine(tmp_path / "quarantine.jsonl")
  used = Usable(tmp_path / "run", resumed=True)
  again = make(config.data, quarantine=quarantine, usable=used, **options)
  assert_same(next(again), first)
  (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
  assert json.loads(line)["index"] == COUNT
  assert "conversations" in json.loads(line)["error"]


@pytest.mark.parametrize("change", ["row_length", "turns", "data", "tokenizer", "tile"])
def test_a_kept_pass_is_of_the_same_data(
  config: config_lib.Config, tmp_path: Path, change: str
) -> None:
  data, tile = config.data, TILE
  tokenizer = Tokenizer(data.tokenizer)

  def key() -> str:
    source = sources.LlavaJson(data.path, data.image_folder, Reader(data, tile))
    return lengths.Lengths(source, tokenizer, data, tile, 0, Quarantine()).key(0)

  before = key()
  data = dataclasses.replace(data, threads=7, packing="buckets", augment="none")
  assert key() == before
  if change == "row_length":
    data = dataclasses.replace(data, row_length=901)
  elif change == "turns":
    data = dataclasses.replace(data, turns_per_row=1)
  elif change == "data":
    text = Path(data.path).read_text()
    Path(data.path).write_text(text + " ")
    assert key() == before  # the same samples
    Path(data.path).write_text(text.replace("what", "which", 1))
  elif change == "tokenizer":
    tokenizer.save(tmp_path / "other")
    tokenizer = Tokenizer(tmp_path / "other")
    (tmp_path / "other" / "tokenizer_config.json").write_text("{}")
  else:
    tile = dataclasses.replace(tile, spatial=0)
  assert key() != before


def test_too_long_is_cut_or_refused_as_the_config_says(config: config_lib.Config) -> None:
  """The shortest samples fit; the longer ones are cut, or left out and counted."""
  source = sources.LlavaJson(config.data.path, config.data.image_folder, lambda picture: picture)
  tokenizer = Tokenizer(config.data.tokenizer)

  def measured(**changes: Any) -> measured_lib.Measured:
    data = dataclasses.replace(config.data, image_aspect="pad", patch_merge="flat", **changes)
    return lengths.Lengths(source, tokenizer, data, TILE, 0, Quarantine()).measured(0)

  whole = measured()
  limit = int(np.median(whole.lengths))
  longer = int((whole.lengths > limit).sum())
  assert 0 < longer < COUNT
  cut = measured(row_length=limit)
  assert cut.cut == longer
  assert cut.lengths.max() == limit
  assert (cut.totals == whole.totals).all()
  refused = measured(row_length=limit, too_long="quarantine")
  assert len(refused.errors) == longer
  assert f"data.row_length is {limit}" in next(iter(refused.errors.values()))
  assert len(refused.sizes().usable) == COUNT - longer


def test_no_usable_sample_is_an_error_before_training(config: config_lib.Config) -> None:
  data = dataclasses.replace(config.data, row_length=10)
  with pytest.raises(ConfigError, match=r"none of the 16 samples can be used|does not fit"):
    make(dataclasses.replace(data, too_long="quarantine"))


def test_a_damaged_pass_is_measured_again(config: config_lib.Config, tmp_path: Path) -> None:
  said: list[str] = []
  options = {"folder": tmp_path, "say": said.append}
  first = next(make(config.data, **options))
  (path,) = tmp_path.glob("lengths-*.npz")
  whole = path.read_bytes()
  for content in (b"", whole[: len(whole) // 2], bytes(len(whole))):
    path.write_bytes(content)
    said.clear()
    assert_same(next(make(config.data, **options)), first)
    assert said[0] == f"{path}: cannot be read; samples are measured again"
    assert path.read_bytes() == whole
  assert not list(tmp_path.glob("*.part"))


def test_a_measuring_process_that_dies_is_one_line(
  config: config_lib.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
  """As when a decoder faults or the kernel takes its memory back."""
  monkeypatch.setattr(lengths, "ALONE", 3)
  monkeypatch.setattr(lengths, "_start", os.abort)  # by its name, in the other process
  data = dataclasses.replace(config.data, processes=2)
  with pytest.raises(config_lib.ConfigError, match=r"a process .* has died behind sample 0 \(out"):
    next(make(data))
