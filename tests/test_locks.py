"""Locks: the second is refused, naming the first; the dead are replaced, on this host and on others."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import locks, storage
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
  for name, seconds in (("BEAT", 0.05), ("PATIENCE", 0.6), ("TORN", 0.2)):
    monkeypatch.setattr(locks, name, seconds)


def elsewhere(folder: Path, **changes: object) -> locks.Owner:
  """Writes a lock as a process on another host leaves it."""
  owner = dataclasses.replace(locks.Owner.here("llava-sp train"), host="far", boot="another kernel")
  owner = dataclasses.replace(owner, **changes)  # type: ignore[arg-type]
  folder.mkdir(exist_ok=True)
  text = json.dumps({**dataclasses.asdict(owner), "beats": 3})
  (folder / locks.FILE).write_text(text)
  return owner


@pytest.mark.parametrize("age", [3600, -3600])
def test_what_a_killed_newcomer_left_is_removed_whatever_the_clock_says(
  tmp_path: Path, age: float
) -> None:
  """Between a dead lock and its own: its guard stays, dated by another clock."""
  elsewhere(tmp_path)
  guard = tmp_path / f"{locks.FILE}.next"
  guard.touch()
  os.utime(guard, (time.time() - age,) * 2)
  began = time.monotonic()
  with locks.Lock(tmp_path, "llava-sp train"):
    assert locks.read(tmp_path).process == os.getpid()  # type: ignore[union-attr]
  assert time.monotonic() - began < 20
  assert not guard.exists()


def test_a_second_process_is_refused_at_once(tmp_path: Path) -> None:
  code = (
    "import sys; from pathlib import Path; from llava_sp_jax import locks\n"
    "try:\n  locks.Lock(Path(sys.argv[1]), 'llava-sp train').__enter__()\n"
    "except locks.LockError as error:\n  print(error)\n"
  )
  with locks.Lock(tmp_path / "run", "llava-sp train"):
    said = subprocess.run(
      [sys.executable, "-c", code, str(tmp_path / "run")],
      cwd=REPOSITORY,
      capture_output=True,
      text=True,
      timeout=20,
      check=True,
    ).stdout
  assert f"run: in use by llava-sp train (process {os.getpid()} on {os.uname().nodename}" in said
  assert not (tmp_path / "run").exists(), "nothing was put there"


def test_the_lock_of_a_process_that_was_killed_is_taken_over(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  code = (
    "import os, sys; from pathlib import Path; from llava_sp_jax import locks\n"
    "locks.Lock(Path(sys.argv[1]), 'llava-sp train').__enter__(); os.kill(os.getpid(), 9)\n"
  )
  subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, check=False)
  dead = locks.read(tmp_path)
  assert dead
  assert dead.alive() is False
  with locks.Lock(tmp_path, "llava-sp train"):
    assert locks.read(tmp_path).process == os.getpid()  # type: ignore[union-attr]
  assert f"the lock of llava-sp train (process {dead.process} " in capsys.readouterr().out
  assert not list(tmp_path.iterdir())


def test_a_number_that_another_process_has_now_is_not_its_owner(tmp_path: Path) -> None:
  (tmp_path / "x").write_text("")
  elsewhere(tmp_path, boot=locks._boot(), started="1")
  with locks.Lock(tmp_path, "llava-sp train"):
    pass
  assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_another_host_that_beats_keeps_its_lock(tmp_path: Path) -> None:
  """In two threads of this process, one of which looks as if it were far away."""
  far = locks.Lock(tmp_path, "llava-sp train")
  far._owner = dataclasses.replace(far._owner, host="far", boot="another kernel")
  with far, pytest.raises(locks.LockError, match=r"in use by llava-sp train .process .* on far"):
    locks.Lock(tmp_path, "llava-sp train").__enter__()


def test_another_host_that_stands_still_loses_it(
  tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
  elsewhere(tmp_path)
  began = time.monotonic()
  with locks.Lock(tmp_path, "llava-sp train"):
    assert time.monotonic() - began > locks.PATIENCE
  said = capsys.readouterr().out
  assert "on far, since" in said.splitlines()[0]
  assert "looking for up to" in said.splitlines()[0]
  assert "left behind and is taken over" in said


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"process": 0, "beats": 1}'])
def test_a_torn_lock_is_nobody_s(tmp_path: Path, content: bytes) -> None:
  (tmp_path / locks.FILE).write_bytes(content)
  with locks.Lock(tmp_path, "llava-sp train"):
    assert locks.read(tmp_path)


def test_who_lost_it_stops_and_leaves_the_other_s(tmp_path: Path) -> None:
  with locks.Lock(tmp_path, "llava-sp train") as lock:
    lock.check()
    other = elsewhere(tmp_path)
    until = time.monotonic() + 10
    while not lock.lost and time.monotonic() < until:
      time.sleep(0.01)
    with pytest.raises(locks.LockError, match=r"taken over by llava-sp train .process .* on far"):
      lock.check()
  assert locks.read(tmp_path) == other


def test_of_two_newcomers_one_has_it(tmp_path: Path) -> None:
  """Sixteen at once find a dead lock, many times."""
  code = """
import sys, threading
from pathlib import Path
from llava_sp_jax import locks
locks.PATIENCE = locks.TORN = 0.05
folder, won = Path(sys.argv[1]), []
(folder / "x").write_text("")
def enter():
  barrier.wait()
  lock = locks.Lock(folder, "llava-sp train")
  try:
    lock.__enter__()
    won.append(lock)
  except locks.LockError:
    pass
for _ in range(40):
  (folder / locks.FILE).write_text("torn")
  won.clear()
  barrier = threading.Barrier(16)
  threads = [threading.Thread(target=enter) for _ in range(16)]
  [t.start() for t in threads]
  [t.join() for t in threads]
  holders = [lock for lock in won if locks.read(folder) == lock._owner]
  assert len(won) == len(holders) == 1, (len(won), len(holders))
  won[0].__exit__(None, None, None)
"""
  done = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)],
    cwd=REPOSITORY,
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("times", [2, 1000])
def test_a_lock_that_cannot_be_read_is_not_taken_over(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
  """Its owner is alive, and a network disk fails for a while, or for long."""
  with locks.Lock(tmp_path, "llava-sp train"):
    real, failed = storage.DISK.look, [0]

    def look(path: Path) -> Any:
      failed[0] += 1
      if failed[0] <= times:
        raise OSError(errno.EIO, "Input/output error", str(path))
      return real(path)

    other = locks.Lock(tmp_path, "llava-sp train")
    monkeypatch.setattr(storage.DISK, "look", look)
    wanted = "in use by llava-sp train" if times == 2 else "cannot be read .*nobody can tell"
    with pytest.raises(locks.LockError, match=wanted):
      other.__enter__()
    monkeypatch.undo()
    owner = locks.read(tmp_path)
    assert owner
    assert owner.process == os.getpid()


def test_a_folder_in_place_of_a_lock_is_named_at_once(tmp_path: Path) -> None:
  (tmp_path / locks.FILE).mkdir()
  began = time.monotonic()
  with pytest.raises(locks.LockError, match=r"lock.json: cannot be read \(.*remove that file"):
    locks.Lock(tmp_path, "llava-sp train").__enter__()
  assert time.monotonic() - began < locks.PATIENCE


def test_a_lock_is_seen_late_or_not_at_all(tmp_path: Path) -> None:
  with locks.Lock(tmp_path / "a", "llava-sp train") as lock:
    assert locks.shows(tmp_path / "a", lock.token)
    elsewhere(tmp_path / "b")  # what a stale listing shows
    later = threading.Timer(0.2, lambda: shutil.copy(tmp_path / "a" / locks.FILE, tmp_path / "b"))
    later.start()
    assert locks.shows(tmp_path / "b", lock.token)
    later.join()
    elsewhere(tmp_path / "b")
    assert not locks.shows(tmp_path / "b", lock.token)
    assert not locks.shows(tmp_path / "c", lock.token)
