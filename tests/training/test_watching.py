"""A whole run that is watched in every way trains exactly like one that nobody watches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from llava_sp_jax import cli
from llava_sp_jax import config as config_lib
from llava_sp_jax.data import anyres, pipeline, validation_split
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.models import build, flops
from llava_sp_jax.training import loop, optimizer, preflight, trace
from tests.conftest import ConfigMaker, dialogue, write_data
from tests.end_to_end.cluster import write_config

STEPS, ROWS, PEAK = 5, 8, 0.125  # PEAK in TFLOP/s
SAMPLES, FRACTION = 24, 0.3  # dialogues are all different up to 24


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """Samples of which every third has no image."""
  folder = tmp_path_factory.mktemp("mixed") / "data"
  write_data(folder, 12)
  samples = []
  for i in range(SAMPLES):
    sample = {"id": str(i), "image": f"{i % 12}.png", "conversations": dialogue(i)}
    if i % 3 == 0:
      del sample["image"]
      first = sample["conversations"][0]
      first["value"] = first["value"].replace("<image>\n", "")
    samples.append(sample)
  (folder / "train.json").write_text(json.dumps(samples))
  return folder


@pytest.fixture(scope="module")
def config(tiny_config: ConfigMaker, mixed: Path) -> Any:
  def make(**train: Any) -> config_lib.Config:
    return tiny_config(
      train={"steps": STEPS, "peak_tflops": PEAK, **train},
      data={
        "path": str(mixed / "train.json"),
        "image_folder": str(mixed / "images"),
        "tokenizer": str(mixed / "tokenizer"),
        "validation_fraction": FRACTION,
        "augment": "mirror_shift",
      },
      optimizer={"warmup_ratio": 0.4},
    )

  return make


def records(folder: Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("watched") / "run"
  loop.train(config(validate_every=2, validate_batches=2), folder, profile="3:4")
  return folder


@pytest.fixture(scope="module")
def unwatched(config: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
  folder = tmp_path_factory.mktemp("unwatched") / "run"
  loop.train(config(preflight=False, sinks=()), folder)
  return folder


@pytest.mark.guard
def test_watching_changes_no_bit(watched: Path, unwatched: Path) -> None:
  ours, theirs = records(watched), records(unwatched)
  assert [r["step"] for r in ours] == list(range(1, STEPS + 1))
  timed = ("_per_second", "goodput", "badput", "mfu", "input_wait")
  same = {name for name in theirs[-1] if not any(part in name for part in timed)}
  assert {"loss", "loss_image", "loss_text", "grad_norm", "grad_norm/lora"} <= same
  for a, b in zip(ours, theirs, strict=True):
    assert {k: a.get(k) for k in same} == {k: b.get(k) for k in same}
  assert len({r["loss"] for r in theirs}) == STEPS


@pytest.mark.guard
def test_a_record_adds_up(watched: Path, config: Any) -> None:
  for record in records(watched):
    parts = [v for k, v in record.items() if k.startswith("grad_norm/")]
    assert np.linalg.norm(parts) == pytest.approx(record["grad_norm"], rel=1e-5)
    assert {k for k in record if k.startswith("grad_norm/")} == {
      "grad_norm/lora",
      "grad_norm/projector",
      "grad_norm/spatial",
    }
    low, high = sorted((record["loss_image"], record["loss_text"]))
    assert low < record["loss"] < high
  settings = config()
  rate = optimizer.schedule(settings.optimizer.learning_rate, STEPS, 0.4)
  for record in records(watched):
    assert record["learning_rate/base"] == pytest.approx(float(rate(record["step"] - 1)), rel=1e-6)
  assert records(watched)[0]["learning_rate/projector"] == 0.0
  assert records(watched)[2]["learning_rate/projector"] == pytest.approx(5e-3)


@pytest.mark.guard
def test_rates_are_those_of_the_batches(unwatched: Path, config: Any) -> None:
  """tokens/s, supervised tokens/s and MFU of a step, from its batch and the steps per second."""
  settings = config()
  tile = anyres.Tile(*build.tile_shape(settings.model))
  rows = pipeline.make(settings.data, Tokenizer(settings.data.tokenizer), tile, ROWS, 0)
  trainable = lambda path: optimizer.group_of(path, "finetune") != optimizer.FROZEN  # noqa: E731
  costs = flops.costs(settings.model, trainable)
  chips = jax.device_count()
  for record in records(unwatched):
    batch = next(rows)
    assert record["tokens"] == batch["weights"].sum()
    if record["step"] == 1:
      assert "mfu" not in record  # it compiled
      continue
    used = batch["segments"] > 0
    images = (batch["slots"] >= 0).sum() / tile.tokens
    done = costs.step(int(used.sum()), int((used * (batch["positions"] + 1)).sum()), images)
    seconds = 1 / record["steps_per_second"]
    assert record["mfu"] == pytest.approx(done / (seconds * chips * PEAK * 1e12), rel=1e-5)
    assert record["tokens_per_second_per_chip"] == pytest.approx(used.sum() / seconds / chips)
    supervised = record["supervised_per_second_per_chip"]
    assert supervised == pytest.approx(record["tokens"] / seconds / chips)
    assert 0 <= record["input_wait"] <= 1


@pytest.mark.guard
def test_validation_stands_where_it_is_due(watched: Path, unwatched: Path) -> None:
  assert [r["step"] for r in records(watched) if "val_loss" in r] == [2, 4, 5]
  losses = [r["val_loss"] for r in records(watched) if "val_loss" in r]
  assert len(set(losses)) == 3
  assert all(0 < loss < 10 for loss in losses)
  assert not any("val_loss" in r for r in records(unwatched))


@pytest.mark.guard
def test_the_trace_is_there(watched: Path, unwatched: Path) -> None:
  (file,) = (watched / trace.FOLDER).rglob("*.xplane.pb")
  assert b"train" in file.read_bytes()
  assert not (unwatched / trace.FOLDER).exists()


@pytest.mark.parametrize(
  ("text", "message"),
  [("3", "expected A:B"), ("a:b", "expected A:B"), ("0:2", "steps 0 to 2 are not among"),
   ("4:3", "steps 4 to 3 are not among"), ("3:99", "not among those that this run will do, 1 to")],
)  # fmt: skip
def test_a_profile_of_other_steps_is_refused_first(
  capsys: pytest.CaptureFixture, config: Any, tmp_path: Path, text: str, message: str
) -> None:
  file = write_config(config(), tmp_path / "c.py")
  run = tmp_path / "run"
  assert cli.main(["train", f"--config={file}", f"--workdir={run}", f"--profile={text}"]) == 1
  assert f"--profile: {message}" in (found := capsys.readouterr().err) or message in found
  assert not run.exists()


def test_steps_that_a_resumed_run_has_done_are_refused() -> None:
  assert list(trace.steps_of("11:12", 11, 20)) == [11, 12]
  with pytest.raises(config_lib.ConfigError, match="will do, 11 to 20"):
    trace.steps_of("10:12", 11, 20)


def test_parts_are_disjoint_whole_and_do_not_depend_on_the_rest() -> None:
  data = config_lib.DataConfig(validation_fraction=0.25)
  train = validation_split.samples(data, validation_split.TRAIN, 4000)
  held = validation_split.samples(data, validation_split.VALIDATION, 4000)
  assert sorted([*train, *held]) == list(range(4000))
  assert 900 < len(held) < 1100
  assert held[:50] == validation_split.samples(data, validation_split.VALIDATION, 1000)[:50]
  more = validation_split.samples(
    config_lib.DataConfig(validation_fraction=0.5), validation_split.VALIDATION, 4000
  )
  assert set(held) < set(more)
  assert validation_split.samples(config_lib.DataConfig(), validation_split.TRAIN, 7) == range(7)


def test_validation_samples_do_not_train(config: Any) -> None:
  data = config().data
  tile = anyres.Tile(*build.tile_shape(config().model))
  held = validation_split.samples(data, validation_split.VALIDATION, SAMPLES)
  (part,) = pipeline.open_parts(data, tile, validation_split.TRAIN)
  train = part.members
  assert len(part.source) == SAMPLES
  assert not set(train) & set(held)
  tokenizer = Tokenizer(data.tokenizer)
  rows = pipeline.make(data, tokenizer, tile, len(train), 0)  # one epoch
  others = pipeline.make(
    data, tokenizer, tile, len(held), 0, None, (0, 1), validation_split.VALIDATION
  )
  seen, validated = ({tuple(r) for r in next(i)["tokens"]} for i in (rows, others))
  assert len(seen) > len(validated) > 0
  assert not seen & validated


@pytest.mark.parametrize(
  ("values", "message"),
  [({}, "no validation split"), ({"validation_fraction": 1.5}, "expected a share"),
   ({"validation_fraction": 0.1, "validation_path": "x"}, "give one of the two")],
)  # fmt: skip
def test_what_is_no_validation_split(values: dict[str, Any], message: str) -> None:
  with pytest.raises(config_lib.ConfigError, match=message):
    validation_split.of_split(config_lib.DataConfig(**values), validation_split.VALIDATION)
  with pytest.raises(config_lib.ConfigError, match="leaves none for validation"):
    validation_split.samples(
      config_lib.DataConfig(validation_fraction=1e-9), validation_split.VALIDATION, 5
    )


def test_validation_may_have_a_file_of_its_own() -> None:
  data = config_lib.DataConfig(path="a", validation_path="b", augment="mirror_shift")
  split = validation_split.of_split(data, validation_split.VALIDATION)
  assert (split.path, split.augment) == ("b", "none")
  assert validation_split.of_split(data, validation_split.TRAIN) == data
  assert list(validation_split.samples(data, validation_split.VALIDATION, 3)) == [0, 1, 2]


def test_the_preflight_looked_at_this_run(config: Any) -> None:
  """The good run above was not passed because nothing was checked."""
  settings = config()
  tile = anyres.Tile(*build.tile_shape(settings.model))
  rows = pipeline.make(settings.data, Tokenizer(settings.data.tokenizer), tile, ROWS, 0)
  seen = preflight.look(next(rows), tile.tokens)
  assert seen.samples == seen.supervised == ROWS
  assert 0 < seen.with_image < ROWS
