"""Asked to stop, a training finishes its step, saves, and says with its code that there is more to do."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.tools import train as train_tool
from llava_sp_jax.training import ledger
from llava_sp_jax.training.stopping import StopRequest
from tests.conftest import ConfigMaker
from tests.end_to_end import cluster


def test_ctrl_c_saves_the_step_and_ends_with_75(
  tiny_config: ConfigMaker,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
) -> None:
  """SIGINT in the middle of step 1; the same command then ends it, and keeps one checkpoint."""
  config = tiny_config("finetune", train={"steps": 2, "save_every": 1, "keep": 1})
  workdir = tmp_path / "run"
  arguments = [
    f"--config={cluster.write_config(config, tmp_path / 'c.py')}",
    f"--workdir={workdir}",
  ]
  step = ledger.Ledger.step

  def interrupted(self: ledger.Ledger, number: int, *samples: Any) -> None:
    step(self, number, *samples)
    signal.raise_signal(signal.SIGINT)

  before = signal.getsignal(signal.SIGINT)
  with monkeypatch.context() as patch:
    patch.setattr(ledger.Ledger, "step", interrupted)
    assert train_tool.main(arguments) == train_tool.STOPPED_EARLY == 75
  assert signal.getsignal(signal.SIGINT) == before
  assert "asked to stop: saved step 1 in " in capsys.readouterr().out
  assert (cluster.last_step(workdir), cluster.saved(workdir)) == (1, [1])
  assert train_tool.main(arguments) == 0
  assert f"continuing {workdir} from step 1" in capsys.readouterr().out
  assert (cluster.last_step(workdir), cluster.saved(workdir)) == (2, [2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_does_not_wait(number: signal.Signals) -> None:
  with StopRequest() as stop:
    assert not stop.asked
    signal.raise_signal(number)
    assert stop.asked
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(number)
