"""Seconds of a run by category, with a clock that is told the time; kills are the end of a record."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import storage
from llava_sp_jax.training import goodput, loop
from tests.conftest import ConfigMaker
from tests.training.looker import Looker, config


class Time:
  def __init__(self, now: float):
    self.now = now

  def __call__(self) -> float:
    return self.now


def seconds(clock: goodput.Clock) -> dict[str, float]:
  """Those above zero, of the whole run."""
  found = goodput.totals(clock.starts())
  return {name: value for name, value in found.items() if value}


def die(clock: goodput.Clock) -> None:
  """Leaves the record as a SIGKILL would, right after a beat."""
  clock._done = True
  clock._wake.set()
  assert clock._thread
  clock._thread.join()
  clock._write()


def start(folder: Path, time: Time, resumes: int) -> goodput.Clock:
  """Two seconds until the record is kept, three of compiling, four of restoring."""
  clock = goodput.Clock(age=2.0, now=time)
  clock.keep(folder)
  with clock.of("restore"):
    time.now += 4
  clock.resumed(resumes)
  clock.enter("step")
  with clock.of("compile"):
    time.now += 3
  return clock


def test_what_was_trained_again_is_lost(tmp_path: Path) -> None:
  """Killed 10 s after a save, and started again 30 s later from the step that was saved."""
  time = Time(1e9)
  first = start(tmp_path, time, resumes=0)
  time.now += 20
  with first.of("save"):
    time.now += 1
  first.mark(3)
  with first.of("evaluation"):
    time.now += 4
  time.now += 6
  assert seconds(first) == {
    "start": 2, "restore": 4, "compile": 3, "step": 26, "save": 1, "evaluation": 4,
  }  # fmt: skip
  die(first)
  time.now += 30 + 2
  second = start(tmp_path, time, resumes=3)
  time.now += 9
  found = seconds(second)
  assert found == {
    "start": 4, "restore": 8, "compile": 6, "step": 29, "save": 1, "lost": 10, "waiting": 30,
  }  # fmt: skip
  assert sum(found.values()) == time.now - (1e9 - 2)
  shares = second.metrics()
  assert shares["goodput"] == pytest.approx(29 / 88)
  assert shares["badput/lost"] == pytest.approx(10 / 88)
  assert sum(shares.values()) == pytest.approx(1)
  assert "badput/input" not in shares
  assert second.table().startswith("goodput 33.0% of 88.0 s in 2 starts\n  step ")
  with second:
    pass


def test_a_record_in_a_bucket_is_continued(bucket: str, tmp_path: Path) -> None:
  folder, time = storage.place(bucket) / tmp_path.name, Time(0.0)
  for number in (1, 2):
    die(start(folder, time, resumes=0))
    assert len(goodput.read(folder)) == number
    time.now += 5 + 2
  found = goodput.totals(goodput.read(folder))
  assert (found["waiting"], found["restore"]) == (5, 8)


def test_two_kills_before_a_save_lose_both(tmp_path: Path) -> None:
  time = Time(0.0)
  for number in range(3):
    clock = start(tmp_path, time, resumes=0)
    time.now += 10
    die(clock)
    time.now += 5 + 2
    assert seconds(clock).get("lost", 0) == 10 * number
  assert seconds(clock)["waiting"] == 10  # the starts begin two seconds before the record


def test_a_start_that_ended_well_loses_nothing(tmp_path: Path) -> None:
  """Not even what it did after it had saved; going back further loses what came after the mark."""
  time = Time(0.0)
  with start(tmp_path, time, resumes=0) as clock:
    for step in (2, 4):
      time.now += 10
      clock.mark(step)
    clock.enter("save")
    time.now += 7
  time.now += 2
  again = start(tmp_path, time, resumes=4)
  assert seconds(again) == {"start": 4, "restore": 8, "compile": 6, "step": 20, "save": 7}
  again.resumed(3)  # step 3 was not saved: nothing is known after step 2
  assert seconds(again)["lost"] == 17
  die(again)


def test_many_steps_on_the_disks_of_hosts_leave_the_mark_of_a_checkpoint(tmp_path: Path) -> None:
  """A host is lost with its disk, so the run resumes from the checkpoint before a hundred of them."""
  time = Time(0.0)
  clock = start(tmp_path, time, resumes=0)
  for step in (10, *range(11, 111)):
    time.now += 1
    clock.mark(step, brief=step > 10)
  die(clock)
  (record,) = goodput.read(tmp_path)
  assert [step for step, _ in record.marks] == [0, 10, 108, 109, 110]
  time.now += 2
  again = start(tmp_path, time, resumes=10)
  assert (seconds(again)["step"], seconds(again)["lost"]) == (1, 100)
  die(again)


def test_a_start_that_trained_nothing_keeps_its_categories(tmp_path: Path) -> None:
  time = Time(0.0)
  clock = goodput.Clock(now=time)
  clock.keep(tmp_path)
  time.now += 50
  die(clock)
  time.now += 2
  again = start(tmp_path, time, resumes=0)
  assert seconds(again)["start"] == 52
  die(again)


@pytest.mark.parametrize("skew", [-100.0, 100.0])
def test_hosts_whose_clocks_differ_add_up(tmp_path: Path, skew: float) -> None:
  """A clock that is behind shows no wait; none makes a second count twice."""
  time = Time(1000.0)
  die(start(tmp_path, time, resumes=0))
  time.now += 10 + skew
  clock = start(tmp_path, time, resumes=0)
  found = seconds(clock)
  assert found.get("waiting", 0) == max(0.0, 10 + skew - 2)
  assert sum(found.values()) == clock.starts()[-1].seen - clock.starts()[0].begun
  die(clock)


def test_a_record_that_cannot_be_read_is_reported(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  for text in ("{", '{"starts": [{"begun": 1}]}'):
    (tmp_path / goodput.FILE).write_text(text)
    clock = goodput.Clock(now=Time(5.0))
    clock.keep(tmp_path)
    die(clock)
    assert "the seconds of earlier starts are not counted" in capsys.readouterr().out
    assert len(goodput.read(tmp_path)) == 1


def test_beats_are_close_enough_for_a_percent() -> None:
  for age in (1, 10, 1000, 1e6):
    period = min(max(age / goodput.BEATS, goodput.SHORTEST), goodput.LONGEST)
    assert period <= max(0.005 * age, goodput.SHORTEST)


class Output:
  """What a step returns: `block_until_ready` waits until `done`."""

  def __init__(self) -> None:
    self.done = threading.Event()

  def block_until_ready(self) -> Output:
    self.done.wait()
    return self


def test_a_wait_beside_a_step_is_no_loss() -> None:
  """Data come 3 s after the devices were idle, then before they are, then to idle devices."""
  time = Time(0.0)
  clock = goodput.Clock(now=time)
  clock.enter("step")

  def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
      if condition():
        return
      threading.Event().wait(0.005)
    pytest.fail("the thread does not follow")

  with goodput.Devices(clock) as devices:
    first, second = Output(), Output()
    devices.computes(first)
    with devices.input():
      time.now += 5
      first.done.set()
      until(lambda: devices._finished == 1)
      time.now += 3
    assert seconds(clock) == {"step": 5, "input": 3}
    devices.computes(second)
    with devices.input():
      time.now += 4
    assert seconds(clock) == {"step": 9, "input": 3}
    second.done.set()
    until(lambda: devices._finished == 2)
    time.now += 1
    with devices.input():
      time.now += 2
    assert seconds(clock) == {"step": 10, "input": 5}


def test_a_run_accounts_for_itself(
  tiny_config: ConfigMaker, tmp_path: Path, looker: Looker
) -> None:
  """The loop: records and file agree, every second has a category, a failed start loses its steps."""

  def fail(number: int) -> None:
    if number == 4:
      raise RuntimeError("the power fails")

  looker.does = fail
  folder = tmp_path / "run"
  with pytest.raises(RuntimeError, match="the power fails"):
    loop.train(config(tiny_config), folder)
  (before,) = goodput.read(folder)
  assert [step for step, _ in before.marks] == [0, 2]
  looker.does = lambda number: None
  clock = goodput.Clock()
  loop.train(config(tiny_config), folder, clock=clock)
  starts = goodput.read(folder)
  assert [[step for step, _ in start.marks] for start in starts] == [[0, 2], [2, 4, 5]]
  found = goodput.totals(starts)
  assert found["lost"] > 0
  assert all(found[name] > 0 for name in ("step", "start", "compile", "restore", "save", "waiting"))
  assert sum(found.values()) == pytest.approx(starts[-1].seen - starts[0].begun)
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  shares: dict[str, Any] = {k: v for k, v in lines[-1].items() if "put" in k and "_" not in k}
  assert sum(shares.values()) == pytest.approx(1)
  assert shares["badput/lost"] > 0
