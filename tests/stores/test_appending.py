"""Lines that are appended to an object of a bucket, which has no append: none is lost or doubled."""

from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import storage
from llava_sp_jax.stores import bucket as bucket_lib


def test_appended_lines_appear_without_being_secured(
  bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(bucket_lib, "SECONDS", 0.05)
  path = storage.place(bucket) / tmp_path.name / "metrics.jsonl"
  store = bucket_lib.Bucket("gs")  # of its own, whose thread starts with this pause
  store.append(path, b"{}\n")
  for _ in range(200):
    if path.exists():
      break
    time.sleep(0.05)
  assert path.read_bytes() == b"{}\n"


class InMemory:
  """The part of fsspec that puts and reads objects; counts the bytes that are put."""

  def __init__(self) -> None:
    self.objects, self.put = dict[str, bytes](), 0

  def pipe_file(self, name: str, data: bytes) -> None:
    self.objects[name] = data
    self.put += len(data)

  def info(self, name: str) -> dict[str, str]:
    if name not in self.objects:
      raise FileNotFoundError(name)
    return {"type": "file"}

  def cat_file(self, name: str) -> bytes:
    return self.objects[name]


def in_memory(**options: Any) -> tuple[bucket_lib.Bucket, InMemory, Path]:
  """A store whose objects are in memory, and a path in it."""
  store, files = bucket_lib.Bucket("gs", **options), InMemory()
  store.__dict__["_files"] = files
  return store, files, storage.place("gs://bucket/a.jsonl")


def test_a_long_log_costs_what_its_length_does(monkeypatch: pytest.MonkeyPatch) -> None:
  """A line a second, for an hour and for four; what a kill would lose stays a part of the time."""
  now, rate = 0.0, 1 << 12
  monkeypatch.setattr(bucket_lib, "RATE", rate)
  monkeypatch.setattr(bucket_lib.Bucket, "_keep_flushing", lambda self: None)
  store, files, path = in_memory(clock=lambda: now)
  line, put = b"x" * 499 + b"\n", {0: 0}
  for second in range(4 * 3600):
    now = float(second)
    store.append(path, line)
    store._put_due()
    there = len(files.objects.get(str(path), b""))
    assert second * len(line) - there <= len(line) * max(bucket_lib.SECONDS, there / rate)
    put[second + 1] = files.put
  assert put[3600] > 0
  assert put[4 * 3600] < 4.4 * put[3600]  # 16 times as much if it was put every 15 s
  store.flush()
  assert files.objects[str(path)] == line * 4 * 3600


def test_a_line_is_appended_while_a_put_waits_for_the_network(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """As a run does between steps, when the bucket does not answer; the line follows those of the put."""
  monkeypatch.setattr(bucket_lib.Bucket, "_keep_flushing", lambda self: None)
  store, files, path = in_memory()
  asked, answers = threading.Event(), threading.Event()
  put = files.pipe_file

  def slowly(name: str, data: bytes) -> None:
    asked.set()
    assert answers.wait(30)
    put(name, data)

  monkeypatch.setattr(files, "pipe_file", slowly)
  store.append(path, b"1\n")
  thread = threading.Thread(target=store.secure, args=(path,))
  thread.start()
  assert asked.wait(30)
  appended = threading.Thread(target=store.append, args=(path, b"2\n"))
  appended.start()
  appended.join(10)
  assert not appended.is_alive(), "it waits for the network"
  answers.set()
  thread.join()
  assert files.objects[str(path)] == b"1\n"
  assert store.content(path) == b"1\n2\n"
  store.secure(path)
  assert files.objects[str(path)] == store.content(path) == b"1\n2\n"


@pytest.mark.parametrize("arrives", [True, False])
def test_lines_whose_put_fails_are_there_once(
  bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
  """Whether the object arrived and only the answer was lost, or not."""
  store, path = bucket_lib.Bucket("gs"), storage.place(bucket) / tmp_path.name / "a.jsonl"
  put = store._files.pipe_file

  def fail(name: str, data: bytes) -> None:
    if arrives:
      put(name, data)
    raise TimeoutError("no answer")

  store.append(path, b"1\n")
  store.secure(path)
  store.append(path, b"2\n")
  with monkeypatch.context() as broken:
    broken.setattr(store._files, "pipe_file", fail)
    with pytest.raises(OSError, match="no answer"):
      store.secure(path)
    store.append(path, b"2\n")
    arrives = not arrives
    with pytest.raises(OSError, match="no answer"):
      store.secure(path)
  assert store.content(path) == b"1\n2\n2\n"
  store.flush()
  assert path.read_bytes() == b"1\n2\n2\n"


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_puts_that_arrive_late_double_nothing_and_lose_nothing(
  monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...]
) -> None:
  """Three puts fail, and their objects arrive later, in any order."""
  store, files, path = in_memory()
  sent = []

  def fail(name: str, data: bytes) -> None:
    sent.append(data)
    raise TimeoutError("no answer")

  with monkeypatch.context() as broken:
    broken.setattr(files, "pipe_file", fail)
    for line in (b"1\n", b"2\n", b"3\n"):
      store.append(path, line)
      with pytest.raises(OSError, match="no answer"):
        store.secure(path)
  assert sent == [b"1\n", b"1\n2\n", b"1\n2\n3\n"]
  for late in order:
    files.objects[str(path)] = sent[late]
    assert store.content(path) == b"1\n2\n3\n"
  store.append(path, b"4\n")
  store.flush()
  assert files.objects[str(path)] == store.content(path) == b"1\n2\n3\n4\n"


def test_an_object_whose_answer_is_lost_holds_the_lines_that_waited(
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """An object that is put as a whole, as after a cut, not line by line."""
  store, files, path = in_memory()
  store.append(path, b"1\n")

  def lose(name: str, data: bytes) -> None:
    files.objects[name] = data
    raise TimeoutError("no answer")

  with monkeypatch.context() as broken:
    broken.setattr(files, "pipe_file", lose)
    with pytest.raises(OSError, match="no answer"):
      store.put(path, b"0\n1\n")
  store.append(path, b"2\n")
  store.flush()
  assert files.objects[str(path)] == b"0\n1\n2\n"


def test_lines_that_wait_move_with_their_folder(bucket: str, tmp_path: Path) -> None:
  store, folder = bucket_lib.Bucket("gs"), storage.place(bucket) / tmp_path.name / "run"
  store.append(folder / "a.jsonl", b"1\n")
  store.move(folder, folder.parent / "aside")
  store.flush()
  assert (folder.parent / "aside" / "a.jsonl").read_bytes() == b"1\n"
  assert not (folder / "a.jsonl").exists()
