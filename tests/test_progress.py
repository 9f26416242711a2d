"""One line of progress: its figures, and when it is printed."""

from __future__ import annotations

import io

import pytest

from llava_sp_jax import progress
from llava_sp_jax.progress import Progress, eta


class Clock:
  """Time that passes when it is told to."""

  now = 100.0

  def monotonic(self) -> float:
    return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
  made = Clock()
  monkeypatch.setattr(progress, "time", made)
  return made


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0, "0:00:00"), (-3, "0:00:00"), (59.9, "0:00:59"), (3661, "1:01:01"), (360000, "100:00:00")],
)
def test_time_left(seconds: float, text: str) -> None:
  assert eta(seconds) == f"eta {text}"


def test_a_line_every_few_seconds_and_for_the_last(
  clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
  told = Progress(4_000, "samples", every=5.0)
  for _ in range(4):
    clock.now += 2
    told.add(1_000, "3 problems", last=told.done == 3_000)
  assert capsys.readouterr().out.splitlines() == [
    "3,000 of 4,000 samples  500 samples/s  eta 0:00:02  3 problems",
    "4,000 of 4,000 samples  500 samples/s  eta 0:00:00  3 problems",
  ]
  assert told.seconds == 8


def test_bytes_are_shown_in_their_unit(clock: Clock) -> None:
  stream = io.StringIO()
  told = Progress(4 * 10**9, "GB", scale=1e9, every=0.0, stream=stream)
  clock.now += 2
  told.add(10**9)
  assert stream.getvalue() == "1.00 of 4.00 GB  0.50 GB/s  eta 0:00:06\n"


def test_a_process_that_prints_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
  told = Progress(2, "steps", every=0.0, shown=False)
  clock.now += 1
  told.at(2, last=True)
  assert (told.done, capsys.readouterr().out) == (2, "")


def test_nothing_done_yet_has_no_rate(clock: Clock) -> None:
  assert Progress(7, "files").line() == "0 of 7 files  0.00 files/s  eta 0:00:00"
