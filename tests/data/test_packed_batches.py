"""Packed batches: measured, read and sought; damage after measuring; the same for any hosts."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import lengths, pipeline, sources
from llava_sp_jax.data.anyres import Reader, Tile
from llava_sp_jax.data.example import BRANCHES
from llava_sp_jax.data.packing import PACKINGS
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.data.tokenizer import Tokenizer
from tests.conftest import IMAGE_SIZE, PATCH_SIZE, ConfigMaker, dialogue

TILE = Tile(IMAGE_SIZE, IMAGE_SIZE // PATCH_SIZE, 6, newline=True)
SIZES = ((24, 24), (48, 40), (24, 60), (50, 24))  # of pictures, in pixels
COUNT = 16


def write_mixed(folder: Path) -> dict[str, str]:
  """COUNT samples with one, two or no pictures of several sizes."""
  rng = np.random.default_rng(0)
  for i, (width, height) in enumerate(SIZES):
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{i}.png")
  made = []
  for i in range(COUNT):
    talk = dialogue(i)
    sample: dict[str, Any] = {"id": str(i), "conversations": talk}
    if i % 4 == 0:
      talk[0]["value"] = talk[0]["value"].replace("<image>\n", "")
    elif i % 4 == 1:
      talk[0]["value"] = "<image>\n" + talk[0]["value"]
      sample["image"] = ["0.png", "2.png"]
    else:
      sample["image"] = f"{(i // 4) % len(SIZES)}.png"
    made.append(sample)
  (folder / "train.json").write_text(json.dumps(made))
  return {"path": str(folder / "train.json"), "image_folder": str(folder)}


def mixed_config(tiny_config: ConfigMaker, folder: Path, **data: Any) -> config_lib.Config:
  values = {
    "image_aspect": "anyres",
    "patch_merge": "spatial_unpad",
    "images_per_row": 12,
    "grid_pinpoints": ((24, 48), (48, 24), (48, 48)),
    "row_length": 900,
    "packing": "first_fit",
    **write_mixed(folder),
    **data,
  }
  return tiny_config(model={"image_newline": True}, data=values)


@pytest.fixture
def config(tiny_config: ConfigMaker, tmp_path: Path) -> config_lib.Config:
  return mixed_config(tiny_config, tmp_path)


def make(data: config_lib.DataConfig, **options: Any) -> pipeline.Batches:
  values = {"batch_size": 4, "seed": 0} | options
  return pipeline.make(data, Tokenizer(data.tokenizer), TILE, **values)


def held(batch: dict[str, Any]) -> list[list[pipeline.Held]]:
  return batch[pipeline.SAMPLES]


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key) if key != pipeline.SAMPLES else None
  assert held(a) == held(b)


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
    for number, (epoch, index, trained) in enumerate(held(batch)[0], 1):
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
  data = dataclasses.replace(config.data, packing=packing, turns_per_row=2)
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
    config.data, packing=packing, turns_per_row=2, image_aspect="pad", augment="mirror_shift"
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


class Sending(concurrent.futures.ThreadPoolExecutor):
  """A thread that is sent its work as a process is: what cannot be pickled fails in its future."""

  def __init__(self, count: int, context: Any, *start: Any):
    super().__init__(1, "sent", *start)

  def submit(self, *work: Any) -> concurrent.futures.Future:  # type: ignore[override]
    return super().submit(_done, work)


def _done(work: tuple[Any, ...]) -> Any:
  do, *given = pickle.loads(pickle.dumps(work))
  return do(*given)


def test_what_cannot_be_sent_to_a_process_is_measured_here(
  config: config_lib.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """A sample that is nested deeply can be read, but not pickled."""
  monkeypatch.setattr(lengths, "ALONE", 3)
  monkeypatch.setattr(lengths, "CHUNK", COUNT)
  monkeypatch.setattr(lengths, "_process", [])
  monkeypatch.setattr(concurrent.futures, "ProcessPoolExecutor", Sending)
  path = tmp_path / "deep.json"
  good = Path(config.data.path).read_text().rstrip()[1:-1]
  path.write_text('[{"id": ' + "[" * 900 + "]" * 900 + "}, " + good + "]")
  data = dataclasses.replace(config.data, path=str(path), processes=2)
  source = sources.LlavaJson(data.path, data.image_folder, Reader(data, TILE))
  measured = lengths.Lengths(
    source, Tokenizer(data.tokenizer), data, TILE, 0, Quarantine(tmp_path / "quarantine.jsonl")
  ).measured(0)
  assert list(measured.errors) == [0]
  assert (measured.lengths[1:] > 0).all()
  assert len(measured.lengths) == COUNT + 1


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
  assert_same(next(make(config.data, quarantine=quarantine, **options)), first)
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
    Path(data.path).write_text(Path(data.path).read_text() + " ")
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

  def measured(**changes: Any) -> lengths.Measured:
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


def test_an_unknown_packing_lists_the_known(config: config_lib.Config) -> None:
  with pytest.raises(ConfigError, match="known: buckets, first_fit, none"):
    make(dataclasses.replace(config.data, packing="best"))


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
