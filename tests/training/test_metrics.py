"""Rates and shares of a record, by hand, with a clock that is told the time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.models import build, flops
from llava_sp_jax.training import measure, metrics
from tests.conftest import ConfigMaker

PATHS = ("language_model/layers/q_proj/lora_a", "projector/fc1/kernel")
CHIPS, PEAK = 4, 0.5  # TFLOP/s


class Clock:
  def __init__(self) -> None:
    self.now = 100.0

  def monotonic(self) -> float:
    return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
  made = Clock()
  monkeypatch.setattr(metrics, "time", made)
  monkeypatch.setattr(metrics.devices, "chip_count", lambda _: CHIPS)
  return made


@pytest.fixture
def config(tiny_config: ConfigMaker) -> config_lib.Config:
  return tiny_config(
    train={"steps": 9, "log_every": 2, "peak_tflops": PEAK, "sinks": ()},
    optimizer={"warmup_ratio": 0.5, "learning_rate": 0.08, "projector_learning_rate": 0.02},
  )


def step(number: int, image: float = 40.0) -> dict[str, Any]:
  """Metrics of a step that learned from 100 + number tokens, 40 of them about images."""
  sums = {
    "loss": 300.0,
    "right": 25.0,
    "image_loss": 100.0,
    "count": 100.0 + number,
    "image_count": image,
    "positions": 1000.0 + number,
    "pairs": 5000.0,
    "image_positions": 84.0,
  }
  grads = {PATHS[0]: jnp.full(4, 3.0), PATHS[1]: jnp.full(1, 8.0)}
  return measure.report({k: jnp.float32(v) for k, v in sums.items()}, grads)


def records(folder: Path) -> list[dict[str, Any]]:
  return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_record_by_hand(clock: Clock, config: config_lib.Config, tmp_path: Path) -> None:
  """Steps of 2 s, a pause of 50 s, half a second of waiting each; the first step compiles."""
  log = metrics.Log(tmp_path, config, PATHS)

  def slow() -> Any:
    clock.now += 0.5
    yield from iter([1] * 99)

  with log:
    for number in range(1, 7):
      log.waiting(slow())
      clock.now += 30.0 if number == 1 else 1.5
      if number in (3, 4):
        with log.pause(step(number)):
          clock.now += 50.0
      log.step(number, step(number), quarantined=2, extra={"x": 1.0} if number == 5 else None)
  found = records(tmp_path)
  assert [r["step"] for r in found] == [2, 4, 5, 6]
  costs = flops.costs(config.model, frozenset(PATHS).__contains__)
  images = 84.0 / build.image_token_count(config.model)
  for record, steps in zip(found, ([2], [3, 4], [5], [6]), strict=True):
    seconds = 2.0 * len(steps)
    positions = sum(1000 + n for n in steps)
    assert record["steps_per_second"] == pytest.approx(0.5)
    assert record["tokens_per_second_per_chip"] == pytest.approx(positions / seconds / CHIPS)
    tokens = sum(100 + n for n in steps)
    assert record["supervised_per_second_per_chip"] == pytest.approx(tokens / seconds / CHIPS)
    assert record["input_wait"] == pytest.approx(0.25)
    done = costs.step(positions, 5000 * len(steps), images * len(steps))
    assert record["mfu"] == pytest.approx(done / (seconds * CHIPS * PEAK * 1e12))
    assert record["grad_norm"] == pytest.approx(10.0)
    assert record["grad_norm/lora"] == pytest.approx(6.0)
    assert record["grad_norm/projector"] == pytest.approx(8.0)
    # Update n - 1 made step n: 5 of 9 steps rise.
    rise = min(1.0, (record["step"] - 1) / 5)
    assert record["learning_rate/base"] == pytest.approx(0.08 * rise)
    assert record["learning_rate/projector"] == pytest.approx(0.02 * rise)
    assert (record.get("x"), record["quarantined"]) == (1.0 if steps == [5] else None, 2)


def test_losses_by_modality_stand_for_tokens_that_there_were() -> None:
  mixed = {k: float(v) for k, v in step(0).items() if k != "grad_squares"}
  assert mixed["loss"] == pytest.approx(3.0)
  assert mixed["loss_image"] == pytest.approx(2.5)
  assert mixed["loss_text"] == pytest.approx(200 / 60)
  assert mixed["token_accuracy"] == pytest.approx(0.25)
  assert (mixed["tokens"], mixed["image_tokens"]) == (100, 40)
  assert float(step(0, image=100.0)["loss_text"]) == 0
  assert float(step(0, image=0.0)["loss_image"]) == pytest.approx(100.0)


@pytest.mark.parametrize(("image", "absent"), [(0.0, "loss_image"), (102.0, "loss_text")])
def test_a_modality_without_tokens_is_not_in_the_record(
  clock: Clock, config: config_lib.Config, tmp_path: Path, image: float, absent: str
) -> None:
  with metrics.Log(tmp_path, config, PATHS) as log:
    log.step(2, step(2, image), quarantined=0)
  (record,) = records(tmp_path)
  assert {"loss_image", "loss_text"} - record.keys() == {absent}
