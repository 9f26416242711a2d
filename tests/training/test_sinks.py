"""Sinks: what they write, and one clear error for what is missing."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax import hardware as devices
from llava_sp_jax.training import metrics, sinks
from tests.conftest import ConfigMaker

RECORD = {
  "step": 3,
  "loss": 1.5,
  "val_loss": 2.25,
  "grad_norm": 0.5,
  "steps_per_second": 0.5,
  "mfu": 0.413,
  "quarantined": 0,
}


def config(*names: str) -> config_lib.Config:
  return config_lib.Config(train=config_lib.TrainConfig(steps=100, sinks=names))


def test_json_lines_hold_every_record(tmp_path: Path) -> None:
  (sink,) = sinks.open_all(tmp_path, config())
  sink.write(RECORD)
  sink.write({"step": 4, "loss": 1.25})
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line) for line in lines] == [RECORD, {"step": 4, "loss": 1.25}]


def test_a_pipe_gets_plain_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
  sink = sinks.Terminal(tmp_path, config())
  sink.write(RECORD)
  sink.close()
  assert capsys.readouterr().out == (
    "step      3/100  loss 1.5000  val loss 2.2500  grad 0.50  0.50 steps/s  MFU 41.3%  "
    "eta 0:03:14\n"
  )


def test_a_terminal_gets_a_table(
  tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes a pipe for a terminal
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "120")
  sink = sinks.Terminal(tmp_path, config())
  sink.write({**RECORD, "grad_norm/spatial": 0.125})
  sink.close()
  printed = capsys.readouterr().out
  assert "\x1b[" in printed
  assert "grad_norm/spatial" in printed
  assert "0.125" in printed


@pytest.mark.parametrize(("columns", "lines"), [("80", "24"), ("40", "12")])
def test_a_small_terminal_shows_step_loss_and_eta(
  tmp_path: Path,
  capsys: pytest.CaptureFixture,
  monkeypatch: pytest.MonkeyPatch,
  columns: str,
  lines: str,
) -> None:
  """Though a run has more figures than it has lines."""
  for name, value in {
    "FORCE_COLOR": "1",
    "TERM": "xterm",
    "COLUMNS": columns,
    "LINES": lines,
  }.items():
    monkeypatch.setenv(name, value)
  sink = sinks.Terminal(tmp_path, config())
  sink.write({**RECORD, **{f"grad_norm/part_{i}": 0.125 for i in range(60)}})
  shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().out)
  sink.close()
  shown = " ".join(shown.split())
  for part in ("step 3/100", "loss 1.5000", "eta 0:03:14"):
    assert part in shown


@pytest.mark.guard
def test_tensorboard_writes_an_event_file(tmp_path: Path) -> None:
  pytest.importorskip("tensorboardX")
  sink = sinks.TensorBoard(tmp_path, config())
  sink.write(RECORD)
  sink.close()
  (file,) = (tmp_path / "tensorboard").iterdir()
  assert b"val_loss" in file.read_bytes()


@pytest.mark.guard
def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  for _ in range(2):
    sink = sinks.Wandb(tmp_path, config())
    sink.write(RECORD)
    sink.close()
  name = (tmp_path / "wandb_id.txt").read_text()
  assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))) >= 1


def test_an_unknown_sink_lists_the_known_ones() -> None:
  with pytest.raises(
    config_lib.ConfigError, match=r"train\.sinks: unknown 'prometheus'; known: te"
  ):
    sinks.check(config("prometheus"))


def test_missing_packages_are_all_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
  known = importlib.util.find_spec

  def find_spec(name: str) -> Any:
    return None if name in ("tensorboardX", "wandb") else known(name)

  monkeypatch.setattr(importlib.util, "find_spec", find_spec)
  with pytest.raises(config_lib.ConfigError) as error:
    sinks.check(config("terminal", "tensorboard", "wandb"))
  assert "pip install tensorboardX (or llava-sp-jax[tensorboard])" in str(error.value)
  assert "pip install wandb (or llava-sp-jax[wandb])" in str(error.value)
  sinks.check(config("terminal"))


def test_a_folder_is_not_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  """wandb leaves a folder of its own name where it runs."""
  (tmp_path / "some_package_of_ours").mkdir()
  monkeypatch.syspath_prepend(tmp_path)
  assert not sinks._installed("some_package_of_ours")
  assert not sinks._installed("no_such_package_at_all")
  assert sinks._installed("rich")


def test_a_sink_that_cannot_be_opened_is_one_line(
  tiny_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """As wandb without a login; what was opened before it is closed."""
  closed = []

  class Good(sinks.JsonLines):
    def close(self) -> None:
      closed.append(self)

  def bad(folder: Path, config: config_lib.Config) -> sinks.Sink:
    raise KeyError("no login")

  monkeypatch.setitem(sinks.SINKS, "good", sinks.MetricsRow(Good))
  monkeypatch.setitem(sinks.SINKS, "bad", sinks.MetricsRow(bad))
  wanted = tiny_config(train={"sinks": ["good", "bad"]})
  with pytest.raises(config_lib.ConfigError, match=r"train.sinks: 'bad' cannot be opened \(KeyErr"):
    sinks.open_all(tmp_path, wanted)
  assert len(closed) == 1


def test_only_the_first_process_writes(
  tiny_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  wanted = tiny_config()
  path = "projector/fc1/kernel"
  values = dict.fromkeys(
    ("loss", "tokens", "image_tokens", "positions", "pairs", "image_positions"), 1.0
  ) | {"grad_squares": [4.0]}
  for process, lines in ((1, 0), (0, 1)):
    monkeypatch.setattr(jax, "process_index", lambda p=process: p)
    with metrics.Log(tmp_path, wanted, [path]) as log:
      log.step(1, values, quarantined=0)
    file = tmp_path / "metrics.jsonl"
    assert len(file.read_text().splitlines() if file.is_file() else []) == lines


@pytest.mark.parametrize(
  ("kind", "peak"),
  [("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5e", 197), ("TPU v5", 459), ("TPU v5p", 459),
   ("TPU v6 lite", 918), ("TPU7x", 2307), ("NVIDIA H100 80GB HBM3", 989),
   ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("cpu", None), ("TPU v9", None)],
)  # fmt: skip
def test_peaks_by_device_kind(kind: str, peak: float | None) -> None:
  assert devices.peak_tflops(kind) == peak


def test_two_cores_are_one_chip() -> None:
  class Core:
    def __init__(self, number: int, coords: Any = None):
      self.id, self.coords = number, coords

  assert devices.chip_count([Core(0, (0, 0, 0)), Core(1, (0, 0, 0)), Core(2, (1, 0, 0))]) == 2
  assert devices.chip_count([Core(0), Core(1)]) == 2
