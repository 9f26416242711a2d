"""A profile of a run in progress: asked for from outside, and refused where nobody trains."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from llava_sp_jax import cli, locks, storage
from llava_sp_jax.training import loop, profiles, trace
from tests.conftest import ConfigMaker
from tests.training.looker import Looker, config, logged


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(profiles, "POLL_SECONDS", 0.02)
  monkeypatch.setattr(profiles, "LOOK_SECONDS", 0.02)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
  """Where traces were started, and None for each that was stopped; no trace is made."""
  seen: list[Any] = []
  monkeypatch.setattr(jax.profiler, "start_trace", seen.append)
  monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append(None))
  return seen


class Asked(threading.Thread):
  """`llava-sp profile` in a thread, started when a step calls it; the step then waits for it."""

  def __init__(self, run: Path, *options: str):
    super().__init__()
    self._arguments, self.code = ["profile", str(run), *options], -1

  def run(self) -> None:
    self.code = cli.main(self._arguments)

  def begin(self, run: Path) -> None:
    """Starts it, and waits until the training has had the time to see the request."""
    self.start()
    until = time.monotonic() + 60
    while not (run / profiles.FOLDER / profiles.REQUEST).exists():
      assert time.monotonic() < until
      time.sleep(0.01)
    time.sleep(1)


def test_the_next_steps_are_traced(
  tiny_config: ConfigMaker, tmp_path: Path, looker: Looker, capsys: pytest.CaptureFixture
) -> None:
  """Asked in step 2 for two steps: a real trace of steps 3 and 4, and an unchanged run."""
  run = tmp_path / "run"
  asked = Asked(run, "--steps=2")
  looker.does = lambda number: asked.begin(run) if number == 2 else None
  assert loop.train(config(tiny_config), run).step == 5
  asked.join()
  printed = capsys.readouterr().out
  assert asked.code == 0, printed
  (place,) = [p for p in (run / profiles.FOLDER).iterdir() if p.is_dir()]
  assert f"steps 3 to 4 of 1 processes: {place}" in printed
  assert f"profile of steps 3 to 4: {place}" in printed
  (file,) = place.rglob("*.xplane.pb")
  assert b"train" in file.read_bytes()
  assert logged(run) == [1, 2, 3, 4, 5]
  assert not (run / profiles.FOLDER / profiles.REQUEST).exists()


def test_a_run_that_ends_answers_with_the_steps_it_has(
  tiny_config: ConfigMaker,
  tmp_path: Path,
  looker: Looker,
  traces: list[Any],
  capsys: pytest.CaptureFixture,
) -> None:
  """Asked for 50 steps with two left, while --profile has the next one."""
  run = tmp_path / "run"
  asked = Asked(run, "--steps=50")
  looker.does = lambda number: asked.begin(run) if number == 2 else None
  assert loop.train(config(tiny_config), run, profile="3:3").step == 5
  asked.join()
  assert "steps 4 to 5 of 1 processes" in capsys.readouterr().out
  assert [getattr(place, "parent", None) for place in traces] == [
    run, None, run / profiles.FOLDER, None,
  ]  # fmt: skip


def test_a_profiler_that_fails_does_not_end_the_run(
  tiny_config: ConfigMaker,
  tmp_path: Path,
  looker: Looker,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
) -> None:
  def fail(_: Any) -> None:
    raise RuntimeError("another profiler is active")

  monkeypatch.setattr(jax.profiler, "start_trace", fail)
  run = tmp_path / "run"
  asked = Asked(run)
  looker.does = lambda number: asked.begin(run) if number == 2 else None
  assert loop.train(config(tiny_config), run).step == 5
  asked.join()
  assert asked.code == 1
  assert "could not trace its steps: another profiler is active" in capsys.readouterr().err


def test_a_training_that_dies_ends_the_wait(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  with locks.Lock(tmp_path, "llava-sp train"):
    asked = Asked(tmp_path)
    asked.begin(tmp_path)
    second = cli.main(["profile", str(tmp_path)])
    assert (second, asked.is_alive()) == (1, True)
    assert "a profile is already asked for; wait for it" in capsys.readouterr().err
  asked.join()
  assert asked.code == 1
  assert "ended before its trace was complete" in capsys.readouterr().err
  assert not (tmp_path / profiles.FOLDER / profiles.REQUEST).exists()


def elsewhere(folder: Path, **changes: Any) -> None:
  owner = dataclasses.replace(locks.Owner.here("llava-sp train"), **changes)
  (folder / locks.FILE).write_text(json.dumps({**dataclasses.asdict(owner), "beats": 3}))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (None, "no llava-sp train is running there; give the --workdir of a run in progress"),
    ({"started": "1"}, "no llava-sp train is running there; the lock of llava-sp train (process"),
    ({"command": "llava-sp merge"}, "in use by llava-sp merge (process"),
    ({"boot": "far", "host": "far"}, "on far, since"),  # its beats stand still
  ],
)
def test_where_nobody_trains(
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  capsys: pytest.CaptureFixture,
  changes: dict[str, Any] | None,
  message: str,
) -> None:
  monkeypatch.setattr(locks, "PATIENCE", 0.2)
  if changes is not None:
    elsewhere(tmp_path, **changes)
  assert cli.main(["profile", str(tmp_path)]) == 1
  assert message in capsys.readouterr().err
  assert cli.main(["profile", str(tmp_path / "gone")]) == 1
  assert cli.main(["profile", str(tmp_path), "--steps=101"]) == 1
  assert "--steps: expected at most 100, found 101" in capsys.readouterr().err


@pytest.fixture
def requests(tmp_path: Path) -> Iterator[profiles.Requests]:
  with profiles.Requests(tmp_path) as made:
    yield made


def test_requests_to_others_are_not_answered(tmp_path: Path, requests: profiles.Requests) -> None:
  """A request that was left behind, to an earlier start; names and steps out of bounds."""
  (tmp_path / profiles.FOLDER).mkdir()
  with locks.Lock(tmp_path, "llava-sp train"):
    owner = locks.read(tmp_path)
    assert owner
    for name, steps, token in (
      ("a", 3, "of another"),
      ("b", 0, owner.token),
      ("../c", 3, owner.token),
      ("d", "3", owner.token),
    ):
      request = profiles.Request(name, steps, token)  # type: ignore[arg-type]
      (tmp_path / profiles.FOLDER / profiles.REQUEST).write_text(
        json.dumps(dataclasses.asdict(request))
      )
      time.sleep(0.1)
      assert requests.peek() is None
    profiles._write(
      tmp_path / profiles.FOLDER / profiles.REQUEST, profiles.Request("e", 3, owner.token)
    )
    until = time.monotonic() + 30
    while requests.peek() is None:
      assert time.monotonic() < until
      time.sleep(0.01)
    requests.take()
    time.sleep(0.1)
    assert requests.peek() is None  # once


def test_a_request_and_answers_in_a_bucket(bucket: str, tmp_path: Path) -> None:
  folder = storage.place(bucket) / tmp_path.name
  request, said = profiles.Request("a", 3, "token"), profiles.Answer(4, 6, 2)
  file = folder / profiles.FOLDER / profiles.REQUEST
  assert profiles.read(file) is None
  profiles._write(file, request)
  assert profiles.read(file) == request
  for process in range(2):
    profiles.answer(folder, request, process, said)
  answers = sorted((folder / profiles.FOLDER / "a").glob("process-*.json"))
  assert [profiles._answer(path) for path in answers] == [said] * 2


def test_a_trace_that_was_stopped_early_is_kept(tmp_path: Path, traces: list[Any]) -> None:
  with trace.Profiler("2:4", tmp_path, 1, 9) as profiler:
    for number in (1, 2, 3):
      with profiler.step(number, None):
        pass
      profiler.after(number, None)
  assert traces == [tmp_path / trace.FOLDER, None]
