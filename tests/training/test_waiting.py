"""Asked to stop while data are waited for, a training ends within a second and goes on exactly."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax.checkpoints import on_disk
from llava_sp_jax.data import prefetch, sources
from llava_sp_jax.training import loop
from tests.conftest import REPOSITORY, ConfigMaker
from tests.training.looker import Looker, config

ROWS = 8  # of a batch


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[int], threading.Event]]:
  """A source that gives so many samples and then hangs, as a file system may; whether it does."""
  allowed, read, open_again, hangs = [10**9], [0], threading.Event(), threading.Event()
  real = sources.LlavaJson.__getitem__

  def slow(self: Any, index: int) -> Any:
    read[0] += 1
    if read[0] > allowed[0]:
      hangs.set()
      open_again.wait()
    return real(self, index)

  monkeypatch.setattr(sources.LlavaJson, "__getitem__", slow)
  yield allowed, hangs
  open_again.set()


def test_a_wait_for_data_ends(
  tiny_config: ConfigMaker,
  tmp_path: Path,
  hanging: Any,
  looker: Looker,
  capsys: pytest.CaptureFixture,
) -> None:
  """SIGTERM, as from outside, when the next batch never comes: all steps so far are saved."""
  folder, (allowed, hangs) = tmp_path / "run", hanging
  # One thread, so that whole steps can be read before the one that never comes.
  made = config(tiny_config)
  made = dataclasses.replace(made, data=dataclasses.replace(made.data, threads=1))

  def stopped_after(steps: int, more: int) -> float:
    """Seconds from the signal, sent when `more` steps are done and the next cannot be read."""
    told = 0.0

    def tell() -> None:
      nonlocal told
      hangs.wait()
      while len(looker.seen) < steps:
        time.sleep(0.01)
      time.sleep(0.3)  # the loop waits now
      told = time.monotonic()
      os.kill(os.getpid(), signal.SIGTERM)

    allowed[0] += more * ROWS
    threading.Thread(target=tell, daemon=True).start()
    assert loop.train(made, folder).step == steps
    return time.monotonic() - told

  allowed[0] = 0
  assert stopped_after(0, 0) < 1
  assert on_disk.steps(folder) == []
  assert "asked to stop: nothing was trained yet" in capsys.readouterr().out
  hangs.clear()
  allowed[0] = 1  # what has hung was counted as read
  assert stopped_after(3, 3) < 1 + 2  # a second, and what saving takes on a busy machine
  assert on_disk.steps(folder) == [2, 3]
  assert "asked to stop: saved step 3 in" in capsys.readouterr().out
  allowed[0] = 10**9
  assert loop.train(made, folder).step == 5
  assert [number for number, *_ in looker.seen] == [0, 1, 2, 3, 4]


def test_what_hangs_does_not_keep_the_process() -> None:
  """The threads that read ahead are left behind when the interpreter ends."""
  code = (
    "import threading\n"
    "from llava_sp_jax.data.prefetch import Prefetcher, Stopped\n"
    "reader = Prefetcher(lambda number: threading.Event().wait(), 0, 2, 4)\n"
    "try:\n  reader.take(lambda: True)\n"
    "except Stopped:\n  print('stopped')\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=60,
    check=True,
  )
  assert done.stdout == "stopped\n"


def test_threads_end_with_their_reader() -> None:
  made: list[int] = []
  reader = prefetch.Prefetcher(lambda number: made.append(number) or number, 5, 3, 4)
  assert [reader.take(lambda: False) for _ in range(6)] == [5, 6, 7, 8, 9, 10]
  assert max(made) <= 10 + 4
  del reader
  for _ in range(500):
    if not any(thread.name.startswith("llava-sp-prefetch") for thread in threading.enumerate()):
      break
    time.sleep(0.01)
  else:
    pytest.fail("threads are left")


def test_an_error_comes_to_whoever_takes_its_place() -> None:
  def make(number: int) -> int:
    if number == 2:
      raise ValueError("two")
    return number

  reader = prefetch.Prefetcher(make, 0, 2, 8)
  assert [reader.take(lambda: False) for _ in range(2)] == [0, 1]
  with pytest.raises(ValueError, match="two"):
    reader.take(lambda: False)
  assert reader.take(lambda: False) == 3
