"""Turns measurements of steps into rates, shares and norms, and writes them to sinks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax import hardware as devices
from llava_sp_jax.models import build, flops
from llava_sp_jax.training import measure, optimizer, sinks

# Summed over the steps between two records to compute the rates.
SUMMED = ("positions", "pairs", "image_positions", "tokens")
# Left out of records: only rates and norms are computed from them.
HIDDEN = ("grad_squares", "positions", "pairs", "image_positions", "image_tokens")


class Log:
  """Collects the metrics of each step and writes a record every `train.log_every` steps.

  The metrics stay on the device until a record is written, so steps between records do not wait for
  the device. All processes call it alike; only the first one writes.
  """

  def __init__(
    self,
    folder: Path,
    config: config_lib.Config,
    paths: Sequence[str],
    account: Callable[[], Mapping[str, float]] = dict,
  ):
    """Opens the sinks that `config` names; `sinks.check` must have accepted them.

    `folder` is the run folder. `paths` are those of the trainable parameters. `account` returns
    values of the whole run for each record.
    """
    self._config, self._paths, self._account = config, sorted(paths), account
    everywhere = jax.devices()
    self._chips = devices.chip_count(everywhere)
    self._peak = config.train.peak_tflops or devices.peak_tflops(everywhere[0].device_kind) or 0.0
    self._costs = flops.costs(config.model, frozenset(paths).__contains__)
    self._learning = optimizer.rates(config.optimizer, config.train.steps, self._paths)
    self._image_tokens = build.image_token_count(config.model)
    self._sinks = [] if jax.process_index() else sinks.open_all(folder, config)
    self._started = time.monotonic()
    self._window: float | None = None  # start time of the steps in `_pending`
    self._pending: list[dict[str, Any]] = []
    self._waited = 0.0

  def __enter__(self) -> Log:
    return self

  def __exit__(self, *_: Any) -> None:
    for sink in self._sinks:
      sink.close()

  @property
  def seconds(self) -> float:
    """Returns the seconds since this log was opened, when the loop began."""
    return time.monotonic() - self._started

  def waiting(self, iterator: Any) -> Any:
    """Returns the next batch of an iterator, and counts the time it takes as waiting for input."""
    before = time.monotonic()
    batch = next(iterator)
    self._waited += time.monotonic() - before
    return batch

  @contextlib.contextmanager
  def pause(self, metrics: Mapping[str, Any]) -> Iterator[None]:
    """Excludes the work in its block from the rates; first waits until `metrics` are computed."""
    jax.block_until_ready(metrics)
    before = time.monotonic()
    yield
    if self._window is not None:
      self._window += time.monotonic() - before

  def step(
    self,
    number: int,
    metrics: Mapping[str, Any],
    quarantined: int,
    extra: Mapping[str, float] | None = None,
  ) -> None:
    """Takes the metrics of step `number`, and writes a record when one is due.

    Args:
      number: the step, from 1.
      metrics: what the step returned, on the device.
      quarantined: how many samples have been quarantined so far.
      extra: values that are added to the record, and make one due at any step.
    """
    train = self._config.train
    starts = self._window is None  # the first step compiles, so rates exclude it
    if not starts:
      self._pending.append({name: metrics[name] for name in SUMMED})
    if extra or starts or number % train.log_every == 0 or number == train.steps:
      values, pending = jax.device_get((dict(metrics), self._pending))
      due = extra or number % train.log_every == 0 or number == train.steps
      rates = self._rates(pending) if not starts else {}
      self._pending, self._waited = [], 0.0
      if due:
        self._write(number, values, rates, quarantined, extra or {})
      self._window = time.monotonic()

  def _write(
    self,
    number: int,
    values: dict[str, Any],
    rates: dict[str, float],
    quarantined: int,
    extra: Mapping[str, float],
  ) -> None:
    if not self._sinks:
      return
    absent = {*HIDDEN}  # and the loss of a modality that the step has no tokens of
    if not values["image_tokens"]:
      absent.add("loss_image")
    if values["image_tokens"] == values["tokens"]:
      absent.add("loss_text")
    record = {
      "step": number,
      **{name: float(value) for name, value in values.items() if name not in absent},
      **extra,
      **{
        f"grad_norm/{part}": norm
        for part, norm in measure.norms(values["grad_squares"], self._paths).items()
      },
      **{f"learning_rate/{group}": rate for group, rate in self._learning(number - 1).items()},
      **rates,
      **self._account(),
      "quarantined": quarantined,
    }
    for sink in self._sinks:
      sink.write(record)

  def _rates(self, pending: list[dict[str, Any]]) -> dict[str, float]:
    """Returns rates per second, most also per chip, over the steps since the last record."""
    assert self._window is not None
    elapsed = max(time.monotonic() - self._window, 1e-9)
    total = {name: sum(float(step[name]) for step in pending) for name in SUMMED}
    rates = {
      "steps_per_second": len(pending) / elapsed,
      "tokens_per_second_per_chip": total["positions"] / elapsed / self._chips,
      "supervised_per_second_per_chip": total["tokens"] / elapsed / self._chips,
      "input_wait": self._waited / elapsed,
    }
    if self._peak:
      images = total["image_positions"] / self._image_tokens
      done = self._costs.step(total["positions"], total["pairs"], images)
      rates["mfu"] = done / (elapsed * self._chips * self._peak * 1e12)
    return rates
