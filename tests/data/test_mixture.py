"""Mixtures: shares exact to a row, sources that go on where they stood, errors of their file."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import ConfigError
from llava_sp_jax.data import mixture, pipeline, rows, schedule, validation_split
from llava_sp_jax.data.quarantine import Quarantine
from tests.conftest import ConfigMaker
from tests.data.every_format import BROKEN, GONE, SILENT, WRITERS, rewritten, write_json
from tests.data.mixed import COUNT, TILE, assert_same, make

UNITS = ((1,), (1, 1), (3, 2, 1), (1000, 1, 1, 1), (5, 7, 11, 13, 1), (4097, 3))
PACKINGS = {"none": {}, "first_fit": {}, "balanced": {"samples_per_batch": 6}, "buckets": {}}
USABLE = COUNT  # of the samples of `write_json`, where they are measured


@pytest.mark.parametrize("units", UNITS)
def test_every_share_is_exact_to_a_row_at_any_point(units: tuple[int, ...]) -> None:
  made, counts, whole = schedule.Schedule(units), [0] * len(units), sum(units)
  for place in range(min(3 * whole, 9000)):
    source, before = made[place]
    assert before == counts[source]
    counts[source] += 1
    for count, unit in zip(counts, units, strict=True):
      assert abs(count * whole - (place + 1) * unit) < whole
    if place % 500 == 0:
      assert schedule.Schedule(units).counts(place + 1) == counts


def test_a_schedule_is_read_out_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
  """Far ahead, and back into blocks that are no longer held."""
  wanted = schedule.Schedule((700, 41, 9))
  monkeypatch.setattr(schedule, "KEPT", 1)
  monkeypatch.setattr(schedule, "BLOCK", 64)
  made = schedule.Schedule((700, 41, 9))
  places = np.random.default_rng(0).integers(0, 4000, 300).tolist()
  assert [made[place] for place in places] == [wanted[place] for place in places]
  assert [made.counts(place) for place in places[:40]] == [wanted.counts(p) for p in places[:40]]


@pytest.fixture
def sources(tiny_config: ConfigMaker, tmp_path: Path) -> config_lib.DataConfig:
  """The samples of `write_json`, which sources of a mixture have in several formats."""
  return write_json(tiny_config, tmp_path).data


def mixed(
  data: config_lib.DataConfig, folder: Path, weights: dict[str, Any], **changes: Any
) -> config_lib.DataConfig:
  """A mixture of the same samples under several names, in its file."""
  file = folder / "mixture.json"
  values = {
    name: {"path": data.path, "image_folder": data.image_folder, "weight": weight}
    for name, weight in weights.items()
  }
  file.write_text(json.dumps(values))
  return dataclasses.replace(data, path="", mixture=str(file), **changes)


def read(batches: pipeline.Batches, steps: int) -> collections.Counter[tuple[str, int]]:
  """How often each sample of each source was read."""
  found = [held for _ in range(steps) for row in next(batches)[pipeline.SAMPLES] for held in row]
  return collections.Counter((held.source, held.sample) for held in found)


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_has_each_sample_as_often_as_its_weight_says(
  sources: config_lib.DataConfig, tmp_path: Path, packing: str
) -> None:
  data = mixed(sources, tmp_path, {"a": 2, "b": 1, "c": 0.5}, packing=packing, **PACKINGS[packing])
  batches = make(data, batch_size=1 if packing in ("none", "first_fit") else 3)
  size = 1 if packing in ("none", "first_fit") else 3
  steps = batches.stream.epoch_rows() // size
  seen = read(batches, steps)
  for name, times in (("a", (2,)), ("b", (1,)), ("c", (0, 1))):
    counts = [seen[name, i] for i in range(USABLE)]
    # Another epoch of a source may need a row more or less.
    assert all(count in {*times, times[0] - 1, times[0] + 1} for count in counts)
    if packing == "none":
      assert {*counts} <= {*times}


def test_the_order_of_a_source_depends_on_nothing_but_the_seed_and_its_name(
  sources: config_lib.DataConfig, tmp_path: Path
) -> None:
  def order(weights: dict[str, Any], name: str) -> list[Any]:
    batches = make(mixed(sources, tmp_path, weights, packing="none"), batch_size=1)
    held = [next(batches)[pipeline.SAMPLES][0][0] for _ in range(60)]
    return [one for one in held if one.source == name][:12]

  assert order({"a": 1, "b": 1}, "a") == order({"a": 7, "b": 3, "c": 1}, "a")
  both = order({"a": 1, "b": 1}, "a"), order({"a": 1, "b": 1}, "b")
  assert [held.sample for held in both[0]] != [held.sample for held in both[1]]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_mixture_resumes_exactly_and_any_processes_make_its_rows(
  sources: config_lib.DataConfig, tmp_path: Path, packing: str
) -> None:
  data = mixed(sources, tmp_path, {"a": 3, "b": 1}, packing=packing, **PACKINGS[packing])
  whole = make(data)
  wanted = [next(whole) for _ in range(9)]
  for step in (0, 5):
    shares = [make(data, rows=mine) for mine in ([0, 3], [1, 2])]
    for share in shares:
      share.resume(step, whole.mixture())
      for batch in wanted[step : step + 3]:
        mine = [0, 3] if share is shares[0] else [1, 2]
        part = {k: v[mine] for k, v in batch.items() if k != pipeline.SAMPLES}
        assert_same(
          next(share), {**part, pipeline.SAMPLES: [batch[pipeline.SAMPLES][i] for i in mine]}
        )


@pytest.mark.parametrize("packing", PACKINGS)
def test_sources_of_a_mixture_that_changes_go_on_where_they_stood(
  sources: config_lib.DataConfig, tmp_path: Path, packing: str
) -> None:
  """Weights change, one source goes, one comes, and the first mixture comes again."""
  mixtures = [{"a": 2, "b": 1}, {"a": 1, "b": 3, "c": 1}, {"c": 1, "a": 5}, {"a": 2, "b": 1}]
  settings = {"packing": packing, **PACKINGS[packing]}
  seen, state, step = collections.Counter[tuple[str, int]](), None, 0
  for weights in mixtures:
    batches = make(mixed(sources, tmp_path, weights, **settings))
    batches.resume(step, state)
    seen += read(batches, 5)
    step, state = step + 5, batches.mixture()
  for name in "abc":
    counts = [seen[name, i] for i in range(USABLE)]
    assert max(counts) - min(counts) <= 1, name  # as without a change
    alone = dataclasses.replace(sources, **settings)
    rows_of = make(alone, seed=mixture.seed_of(0, name), batch_size=4)
    count = sum(seen[name, i] for i in range(COUNT + 3))
    held, at = [], 0
    while len(held) < count:
      held += rows_of.stream[at][1].samples
      at += 1
    first = collections.Counter(held[:count])
    assert first == {i: n for (source, i), n in seen.items() if source == name}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_mixture_has_every_format_quarantine_and_sizes_of_each_source(
  sources: config_lib.DataConfig, tmp_path: Path, kind: str
) -> None:
  """A source in a mixture gives the rows that it gives alone, and its bad samples its name."""
  other = rewritten(sources, kind, tmp_path / "other")
  values = {
    "json": {"path": Path(sources.path).name, "image_folder": ".", "weight": 1},  # from the file's
    "other": {"path": other.path, "image_folder": other.image_folder, "weight": 1},
  }
  (tmp_path / "mixture.json").write_text(json.dumps(values))
  data = dataclasses.replace(sources, path="", mixture=str(tmp_path / "mixture.json"))
  bad = Quarantine(tmp_path / "quarantine.jsonl")
  batches = make(data, batch_size=1, quarantine=bad)
  found = [next(batches) for _ in range(batches.stream.epoch_rows())]
  for name, alone in (("json", sources), ("other", other)):
    single = make(alone, batch_size=1, seed=mixture.seed_of(0, name))
    for batch in found:
      if rows.names(batch[pipeline.SAMPLES]) == [name]:
        same = next(single)
        same[pipeline.SAMPLES] = [
          [held._replace(source=name) for held in row] for row in same[pipeline.SAMPLES]
        ]
        assert_same(batch, same)
    assert all((name, i) in bad for i in (BROKEN, GONE, SILENT))
  again = Quarantine(tmp_path / "quarantine.jsonl")
  assert again.count == bad.count == 6


def test_the_validation_split_has_shares_of_all_sources(
  sources: config_lib.DataConfig, tmp_path: Path
) -> None:
  data = mixed(sources, tmp_path, {"a": 5, "b": 1}, packing="none", validation_fraction=0.4)
  held = len(validation_split.samples(data, "validation", COUNT + 3))
  parts = {split: pipeline.open_parts(data, TILE, split) for split in ("train", "validation")}
  for part, other in zip(*parts.values(), strict=True):
    assert not set(part.members) & set(other.members)
    assert other.weight == 1
  batches = make(data, batch_size=1, split="validation")
  seen = read(batches, 2 * held)
  assert set(seen.values()) == {1}
  assert len(seen) == 2 * held
  given = dataclasses.replace(data, validation_fraction=0.0, validation_path=sources.path)
  assert [p.name for p in pipeline.open_parts(given, TILE, "validation")] == [""]
  few = dataclasses.replace(data, validation_fraction=1e-9)
  with pytest.raises(ConfigError, match=r"leaves none of any source for validation"):
    pipeline.open_parts(few, TILE, "validation")


WRONG: dict[str, str] = {
  "[]": r"m.json: expected a JSON object, found a list; expected {\"NAME\"",
  "{}": r"m.json names no source; expected",
  '{"a": "x.json"}': r"m.json, 'a': expected .*; found 'x.json'",
  '{"a": {"path": "x.json"}}': r"'a': expected",
  '{"": {"path": "x.json", "weight": 1}}': r"'': expected",
  '{"a": {"path": "x.json", "weight": 1, "share": 2}}': r"'share': 2",
  '{"a": {"path": "x.json", "weight": 1, "source": 2}}': r"source is no text",
  '{"a": {"path": "x.json", "weight": 0}}': r"weight 0; expected a number above 0: how many",
  '{"a": {"path": "x.json", "weight": false}}': r"weight False; expected",
  '{"a": {"path": "x.json", "weight": 1e-9}}': r"weight 1e-09; expected",
  '{"a": {"path": "gone.json", "weight": 1}}': r"^data.mixture: a: no file",
  '{"a": {"path": "x.json", "weight": 1, "source": "x"}}': r"data.source: .*x",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_mixture_is_one_line(tmp_path: Path, text: str) -> None:
  (tmp_path / "m.json").write_text(text)
  data = config_lib.DataConfig(mixture=str(tmp_path / "m.json"))
  with pytest.raises((ConfigError, FileNotFoundError), match=WRONG[text]) as raised:
    pipeline.open_parts(data, TILE, "train")
  assert "\n" not in str(raised.value)


def test_a_mixture_that_is_not_there_or_not_alone(tmp_path: Path) -> None:
  data = config_lib.DataConfig(mixture=str(tmp_path / "m.json"))
  with pytest.raises(ConfigError, match=r"m.json cannot be read \(No such file"):
    pipeline.open_parts(data, TILE, "train")
  with pytest.raises(ConfigError, match=r"data.mixture, data.path: found both"):
    pipeline.open_parts(dataclasses.replace(data, path="x.json"), TILE, "train")


def test_a_table_tells_what_has_changed() -> None:
  then = {name: {"weight": "1", "samples": name} for name in "abc"}
  now = {**then, "b": {"weight": "1/2", "samples": "b"}, "c": {"weight": "1", "samples": "x"}}
  del now["a"]
  assert mixture.differences(now, then) == {
    "data": ["samples of c have fingerprint x here, c there"],
    "mixture": ["a only there", "b has weight 1/2 here, 1 there"],
  }
  assert not mixture.differences(then, then)
