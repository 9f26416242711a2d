"""What is drawn for a sample, against numpy's own generator; sizes, parts and windows of an epoch."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax import jsonl
from llava_sp_jax.data import (
  image,
  lengths,
  packing,
  pipeline,
  samples,
  sources,
  validation_split,
)
from llava_sp_jax.data.anyres import Reader, Tile
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.data.packing import Shape, Sizes
from llava_sp_jax.data.quarantine import Quarantine, reasons
from llava_sp_jax.data.tokenizer import Tokenizer
from tests.conftest import COLORS, IMAGE_SIZE, ConfigMaker

TILE = Tile(IMAGE_SIZE, 6)
SEED, COUNT = 5, 12


@pytest.fixture(scope="module")
def data(tiny_config: ConfigMaker) -> config_lib.DataConfig:
  return tiny_config(data={"turns_per_row": 1, "augment": "mirror_shift"}).data


@pytest.fixture(scope="module")
def tokenizer(data: config_lib.DataConfig) -> Tokenizer:
  return Tokenizer(data.tokenizer)


def make(data: config_lib.DataConfig, tokenizer: Tokenizer, **options: Any) -> pipeline.Batches:
  return pipeline.make(data, tokenizer, TILE, **({"batch_size": COUNT, "seed": SEED} | options))


def shifted(tile: np.ndarray, rows: int, columns: int, mirror: int) -> np.ndarray:
  """`mirror_shift` pixel by pixel: what lies beyond the border is the border."""
  side = len(tile)
  reach = side // 8
  result = np.empty_like(tile)
  for y, x in np.ndindex(side, side):
    column = side - 1 - x if mirror else x
    from_y = min(max(y + rows - reach, 0), side - 1)
    from_x = min(max(column + columns - reach, 0), side - 1)
    result[y, x] = tile[from_y, from_x]
  return result


def test_draws_are_those_of_seed_epoch_and_sample(
  data: config_lib.DataConfig, tokenizer: Tokenizer
) -> None:
  """Turns and pixels of each visit, drawn here by the rule that is written down: a generator of
  (seed, epoch, index), first the turns, then the shift of rows and columns, then the mirror."""
  plain = make(dataclasses.replace(data, augment="none"), tokenizer)
  iterator = make(data, tokenizer)
  talks = json.loads(Path(data.path).read_text())
  drawn, mirrors = {}, set()
  for _ in range(3):
    batch, bare = next(iterator), next(plain)
    for row, (held,) in enumerate(batch[pipeline.SAMPLES]):
      assert bare[pipeline.SAMPLES][row] == [held]
      rng = np.random.default_rng([SEED, held.epoch, held.sample])
      turns = len(talks[held.sample]["conversations"]) // 2
      (turn,) = sorted(rng.choice(turns, 1, replace=False))
      color = COLORS[(held.sample + turn) % len(COLORS)]
      learned = batch["targets"][row][batch["weights"][row] > 0]
      assert f"{color}, yes" in tokenizer.decode(learned.tolist())
      rows, columns = rng.integers(0, 2 * (IMAGE_SIZE // 8) + 1, 2)
      mirror = int(rng.integers(2))
      wanted = shifted(bare["images"][row, 0], rows, columns, mirror)
      np.testing.assert_array_equal(batch["images"][row, 0], wanted)
      drawn.setdefault(held.sample, set()).add((held.epoch, turn, rows, columns, mirror))
      mirrors.add(mirror)
  assert {epoch for visits in drawn.values() for epoch, *_ in visits} == {0, 1, 2}
  assert max(len({visit[1:] for visit in visits}) for visits in drawn.values()) == 3
  assert mirrors == {0, 1}


@pytest.mark.parametrize("other", [(6, 0, 3), (5, 1, 3), (5, 0, 4), (0, 5, 3)])
def test_every_part_of_a_visit_changes_what_is_drawn(other: tuple[int, int, int]) -> None:
  first = samples.rng_of(5, 0, 3).integers(0, 1 << 30, 8)
  np.testing.assert_array_equal(first, samples.rng_of(5, 0, 3).integers(0, 1 << 30, 8))
  assert (samples.rng_of(*other).integers(0, 1 << 30, 8) != first).all()


def test_shifts_reach_both_sides_and_half_are_mirrored() -> None:
  tile = np.random.default_rng(0).normal(size=(16, 16, 3)).astype(np.float32)
  seen = set()
  for index in range(300):
    rng, twin = (samples.rng_of(0, 0, index) for _ in range(2))
    found = image.AUGMENTS["mirror_shift"](tile, rng)
    rows, columns = twin.integers(0, 5, 2)
    mirror = int(twin.integers(2))
    np.testing.assert_array_equal(found, shifted(tile, rows, columns, mirror))
    seen.add((int(rows), int(columns), mirror))
  assert len(seen) == 5 * 5 * 2


@pytest.mark.parametrize(
  "question", ["<image>\n<image>\nq0", "see <image> and <image>", "<image>\nq0"]
)
def test_turns_that_are_drawn_keep_every_image(question: str) -> None:
  """Whether the first turn, which shows them, is among them or not."""
  turns = [(question, "a0"), *((f"q{i}", f"a{i}") for i in range(1, 4))]
  firsts = set()
  for seed in range(20):
    (first, _), *later = drawn = samples.draw_turns(turns, 2, np.random.default_rng(seed))
    places = sorted(np.random.default_rng(seed).choice(4, 2, replace=False))
    assert [answer for _, answer in drawn] == [f"a{i}" for i in places]
    assert later == [(f"q{places[1]}", f"a{places[1]}")]
    firsts.add(places[0])
    marks = question.count("<image>")
    assert first == (question if places[0] == 0 else "<image>\n" * marks + f"q{places[0]}")
  assert firsts == {0, 1, 2}


@pytest.mark.parametrize(("limit", "answers"), [(1, 1), (2, 2), (3, 3), (4, 3)])
def test_no_more_turns_than_asked_for(
  data: config_lib.DataConfig, tokenizer: Tokenizer, limit: int, answers: int
) -> None:
  writer = samples.SampleEncoder(tokenizer, dataclasses.replace(data, turns_per_row=limit))
  talk = [
    {"from": who, "value": text}
    for i in range(3)
    for who, text in (("human", f"is it {i}?"), ("gpt", "red, yes"))
  ]
  runs = writer.runs({"conversations": talk}, np.random.default_rng(0))
  learned = [
    i for run in runs for i, supervised in zip(run.ids, run.supervised, strict=True) if supervised
  ]
  assert tokenizer.decode(learned).count("red, yes") == answers


def test_what_exactly_fits_is_not_too_long(
  data: config_lib.DataConfig, tokenizer: Tokenizer
) -> None:
  talk = [{"from": "human", "value": "is it red?"}, {"from": "gpt", "value": "red, yes"}]
  sample = {"conversations": talk}

  def size(limit: int) -> samples.SampleSize:
    kept = dataclasses.replace(data, row_length=limit, too_long="quarantine")
    writer = samples.SampleEncoder(tokenizer, kept)
    return writer.size(writer.runs(sample, np.random.default_rng(0)), [])

  length = size(500).length
  assert size(length) == samples.SampleSize(length, length, 0)
  with pytest.raises(SampleError, match=rf"{length} tokens, but data.row_length is {length - 1}"):
    size(length - 1)


# ---- measuring --------------------------------------------------------------------------------------


def measurer(
  data: config_lib.DataConfig, tokenizer: Tokenizer, seed: int = SEED
) -> lengths.Lengths:
  source = sources.LlavaJson(data.path, data.image_folder, Reader(data, TILE))
  return lengths.Lengths(source, tokenizer, data, TILE, seed, Quarantine())


def test_what_is_measured_is_what_this_epoch_reads(
  data: config_lib.DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
  """Turns are drawn, so an epoch has sizes of its own; samples are handed over in chunks."""
  monkeypatch.setattr(lengths, "CHUNK", 5)
  measured, iterator = measurer(data, tokenizer), make(data, tokenizer)
  found = [measured.measured(epoch).lengths.tolist() for epoch in range(3)]
  assert found[0] != found[1] != found[2]
  for epoch in range(3):
    batch = next(iterator)
    for row, (held,) in enumerate(batch[pipeline.SAMPLES]):
      assert held.epoch == epoch
      assert found[epoch][held.sample] == (batch["segments"][row] > 0).sum()


def test_one_token_too_many_is_cut_and_counted(
  data: config_lib.DataConfig, tokenizer: Tokenizer
) -> None:
  whole = dataclasses.replace(data, turns_per_row=0)
  longest = int(measurer(whole, tokenizer).measured(0).lengths.max())
  for limit, cut in ((longest, 0), (longest - 1, 1)):
    found = measurer(dataclasses.replace(whole, row_length=limit), tokenizer).measured(0)
    longer = int((found.totals == longest).sum()) if cut else 0
    assert found.cut == longer


# Settings that change no size. All others must change the name under which sizes are kept.
NO_SIZE = {"threads", "processes", "packing", "samples_per_batch", "samples_per_row",
           "bucket_lengths", "augment", "image_mean", "image_std", "path", "source", "tokenizer",
           "validation_path", "validation_fraction", "mixture"}  # fmt: skip
OTHER: dict[str, Any] = {
  "source": "tfds",
  "template": "plain",
  "turns": "branch",
  "too_long": "quarantine",
  "image_aspect": "square",
  "image_fit": "stretch",
  "patch_merge": "spatial",
  "packing": "buckets",
  "augment": "none",
  "grid_pinpoints": ((24, 48),),
  "bucket_lengths": (9,),
  "image_mean": (0.1,) * 3,
  "image_std": (0.1,) * 3,
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(config_lib.DataConfig)])
def test_sizes_are_kept_under_all_that_they_depend_on(
  data: config_lib.DataConfig, tokenizer: Tokenizer, field: str
) -> None:
  """A new setting is held to change sizes until it is written down that it does not."""
  source = sources.LlavaJson(data.path, data.image_folder, lambda picture: picture)

  def key(data: config_lib.DataConfig, seed: int = SEED, epoch: int = 0) -> str:
    return lengths.Lengths(source, tokenizer, data, TILE, seed, Quarantine()).key(epoch)

  before = getattr(data, field)
  other = OTHER.get(field, before + 1 if isinstance(before, int | float) else f"{before}x")
  changed = dataclasses.replace(data, **{field: other})
  assert other != before
  assert (key(changed) == key(data)) == (field in NO_SIZE)
  assert len({key(data), key(data, epoch=1), key(data, seed=6)}) == 3
  undrawn = dataclasses.replace(data, turns_per_row=0)
  assert key(undrawn, epoch=1) == key(undrawn, seed=6) == key(undrawn)


# ---- an epoch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", packing.PACKINGS)
@pytest.mark.parametrize("count", [3, 4, 5, 8, 11])
def test_an_epoch_of_several_windows_has_every_sample_once(
  name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(packing, "WINDOW", 4)
  sizes = np.random.default_rng(count).integers(1, 9, count).astype(np.int32)
  all_ = Sizes(sizes, np.zeros(count, np.int32), np.arange(count, dtype=np.int32))
  rows = packing.plan(packing.PACKINGS[name], all_, Shape(10, 1, 2, samples=3), 0, 0)
  assert sorted(i for row in rows for i in row.samples) == list(range(count))


def test_samples_are_packed_within_their_window(monkeypatch: pytest.MonkeyPatch) -> None:
  """Two windows of four samples that fill a row in pairs: never a pair across the border."""
  monkeypatch.setattr(packing, "WINDOW", 4)
  half = Sizes(np.full(8, 5, np.int32), np.zeros(8, np.int32), np.arange(8, dtype=np.int32))
  rows = packing.Rows.of(packing.first_fit(range(8), half, Shape(10, 1, 1)))
  assert [row.samples for row in rows] == [(0, 1), (2, 3), (4, 5), (6, 7)]
  assert packing.fill(rows, half) == 1.0
  wide = Sizes(np.full(8, 6, np.int32), np.zeros(8, np.int32), np.arange(8, dtype=np.int32))
  assert (
    packing.fill(packing.Rows.of(packing.first_fit(range(8), wide, Shape(10, 1, 1))), wide) == 0.6
  )


@pytest.mark.parametrize("name", packing.PACKINGS)
def test_the_validation_split_never_trains(
  data: config_lib.DataConfig, tokenizer: Tokenizer, name: str
) -> None:
  samples = 3 if packing.PACKINGS[name].counted else 0
  held = dataclasses.replace(data, packing=name, samples_per_batch=samples, validation_fraction=0.4)
  seen = {}
  for split in (validation_split.TRAIN, validation_split.VALIDATION):
    iterator = make(held, tokenizer, batch_size=2, split=split)
    rows = iterator.stream.epoch(0)
    seen[split] = [i for row in rows for i in row.samples]
    assert (
      sorted(seen[split])
      == list(validation_split.samples(held, split, COUNT))
      == list(iterator.usable[""])
    )
  assert sorted(i for indices in seen.values() for i in indices) == list(range(COUNT))


def test_the_validation_split_is_not_augmented(
  data: config_lib.DataConfig, tokenizer: Tokenizer
) -> None:
  held = dataclasses.replace(data, validation_fraction=0.4)
  for split, same in ((validation_split.VALIDATION, True), (validation_split.TRAIN, False)):
    shown, plain = (
      next(make(d, tokenizer, batch_size=3, split=split))["images"]
      for d in (held, dataclasses.replace(held, augment="none"))
    )
    assert np.array_equal(shown, plain) == same


def test_a_bad_sample_is_written_down_once_in_the_life_of_a_run(tmp_path: Path) -> None:
  path = tmp_path / "quarantine.jsonl"
  first = Quarantine(path)
  first.add(3, {"id": "x"}, ValueError("bad"))
  other = Quarantine(path, process=1)
  other.add(7, {"id": "y"}, ValueError("bad"))
  again = Quarantine(path)
  assert (again.count, 3 in again, 7 in again, 4 in again) == (2, True, True, False)
  for index in (3, 7, 4):
    again.add(index, "no dictionary", ValueError("bad"))
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  assert [(line["index"], line["id"]) for line in lines] == [(3, "x"), (4, "not a dictionary")]
  assert again.count == 3


def test_a_full_disk_names_the_file_and_nothing_is_lost(tmp_path: Path) -> None:
  """The line that was cut off is written again, by the same run or the next one."""
  path, limit = tmp_path / "quarantine.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
  first = Quarantine(path)
  first.add(3, {"id": "x"}, ValueError("bad"))
  resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, limit[1]))
  try:
    with pytest.raises(OSError, match="large") as raised:
      first.add(4, {"id": "y"}, ValueError("bad"))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert raised.value.filename == str(path)
  assert path.read_bytes().count(b"\n") == 1
  assert not path.read_bytes().endswith(b"\n"), "a part of the second line is there"
  again = Quarantine(path)
  assert (again.count, first.count) == (1, 1)
  first.add(4, {"id": "y"}, ValueError("bad"))
  again.add(5, {"id": "z"}, ValueError("bad"))
  assert [record["index"] for record in jsonl.read(path)[0]] == [3, 4, 5]


def test_lines_that_are_no_entries_do_not_count(tmp_path: Path) -> None:
  path = tmp_path / "quarantine.jsonl"
  good = json.dumps({"index": 3, "id": "x", "error": "bad"})
  lines = ["[1]", "7", '{"index": Infinity}', '{"index": "5", "error": 3}', "\udcff", good]
  path.write_bytes("".join(line + "\n" for line in lines).encode(errors="surrogateescape"))
  assert (Quarantine(path).count, reasons(path)) == (1, ["bad"])
