"""Asked to stop, a training finishes its step, saves, and says with its code that there is more to do."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.tools import train as train_tool
from llava_sp_jax.train import ledger, loop
from tests.conftest import REPOSITORY, ConfigMaker
from tests.end_to_end import cluster


def test_ctrl_c_saves_the_step_and_ends_with_75(
  tiny_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
  """SIGINT in the middle of step 1; the same command then ends it, and keeps one checkpoint."""
  config = tiny_config("finetune", train={"steps": 2, "save_every": 1, "keep": 1})
  workdir = tmp_path / "run"
  arguments = [
    f"--config={cluster.write_config(config, tmp_path / 'c.py')}",
    f"--workdir={workdir}",
  ]
  step = ledger.Ledger.step

  def interrupted(self: ledger.Ledger, number: int, samples: Any) -> None:
    step(self, number, samples)
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
  with loop.StopRequest() as stop:
    assert not stop.asked
    signal.raise_signal(number)
    assert stop.asked
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(number)


# Trains until the images of step 3 are read, which takes for ever; argv: config file, run folder.
SLOW = """
import sys, time
from llava_sp_jax import cli
from llava_sp_jax.data import image
read, count = image.read, [0]
def slowly(*arguments):
  count[0] += 1
  if count[0] > 30:
    print("waits", flush=True)
    time.sleep(600)
  return read(*arguments)
image.read = slowly
sys.exit(cli.main(["train", f"--config={sys.argv[1]}", f"--workdir={sys.argv[2]}"]))
"""


@pytest.mark.guard
def test_a_wait_for_data_ends_when_asked(tiny_config: ConfigMaker, tmp_path: Path) -> None:
  """At once, with what was learned; a thread that reads from a disk that is away holds up nothing."""
  config = tiny_config("pretrain", "none", train={"steps": 9, "preflight": False, "batch_size": 4},
                       mesh={"fsdp": 4, "tensor": -1}, data={"threads": 1})  # fmt: skip
  file, workdir = cluster.write_config(config, tmp_path / "c.py"), tmp_path / "run"
  one = subprocess.Popen([sys.executable, "-c", SLOW, str(file), str(workdir)], cwd=REPOSITORY,
                         stdout=subprocess.PIPE, text=True)  # fmt: skip
  deadline = time.monotonic() + 300
  while cluster.last_step(workdir) < 7:
    assert one.poll() is None
    assert time.monotonic() < deadline
    time.sleep(0.05)
  time.sleep(1)
  one.send_signal(signal.SIGTERM)
  said, _ = one.communicate(timeout=30)
  assert one.returncode == 75
  assert "asked to stop: saved step 7 in " in said
  assert cluster.saved(workdir) == [7]
