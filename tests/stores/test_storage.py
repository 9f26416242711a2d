"""Files of a run on a disk and in a bucket: the same words, and what a kill leaves is whole."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import files, folders, jsonl, locks, storage
from llava_sp_jax.convert import places
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.stores import bucket as bucket_lib
from llava_sp_jax.stores import ranges
from llava_sp_jax.training import ledger, peers
from tests import object_store
from tests.conftest import REPOSITORY


@pytest.fixture(params=["disk", "bucket"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
  """A folder of each kind that does not exist yet."""
  if request.param == "disk":
    yield tmp_path / "run"
  else:
    yield storage.place(request.getfixturevalue("bucket")) / tmp_path.name / "run"


def run(code: str, *arguments: object) -> str:
  """What a process of its own prints that runs `code`; it may end by a kill."""
  given = [sys.executable, "-c", code, *map(str, arguments)]
  done = subprocess.run(given, cwd=REPOSITORY, capture_output=True, text=True, check=False)
  assert done.returncode in (0, -9), done.stderr
  return done.stdout


def test_a_file_is_put_whole(folder: Path) -> None:
  store = storage.of(folder)
  store.make(folder)
  assert store.content(folder / "a.json") == b""
  for text in (b"one\r\n", b"", b"another"):
    store.put(folder / "a.json", text)
    assert store.content(folder / "a.json") == (folder / "a.json").read_bytes() == text
  assert [path.name for path in folder.iterdir()] == ["a.json"]


def test_of_two_that_create_a_file_one_succeeds(folder: Path) -> None:
  store = storage.of(folder)
  store.make(folder)
  assert store.create(folder / "a", b"one")
  assert not store.create(folder / "a", b"two")
  assert store.content(folder / "a") == b"one"


def test_overwriting_changes_the_version(folder: Path) -> None:
  store = storage.of(folder)
  store.make(folder)
  with pytest.raises(FileNotFoundError):
    store.overwrite(folder / "a", b"one")
  store.put(folder / "a", b"one")
  seen = store.look(folder / "a")
  store.overwrite(folder / "a", b"two")
  now = store.look(folder / "a")
  assert seen is not None
  assert now is not None
  assert (seen.content, now.content) == (b"one", b"two")
  assert seen.version != now.version
  assert store.changed(folder / "a") > 1e18
  assert store.look(folder / "b") is None


def test_what_is_secured_survives_a_kill_and_no_line_is_torn(folder: Path) -> None:
  code = (
    "import os, signal, sys; from llava_sp_jax import storage\n"
    "path = storage.place(sys.argv[1]); store = storage.of(path); store.make(path.parent)\n"
    "store.append(path, b'1\\n'); store.append(path, b'2\\n'); store.secure(path)\n"
    "store.append(path, b'3\\n'); print(store.content(path))\n"
    "os.kill(os.getpid(), signal.SIGKILL if len(sys.argv) > 2 else 0); store.flush()"
  )
  assert run(code, folder / "a.jsonl") == f"{b'1 2 3 '.replace(b' ', bytes([10]))!r}\n"
  whole = storage.of(folder).content(folder / "a.jsonl")
  assert whole == b"1\n2\n3\n"
  run(code, folder / "a.jsonl", "killed")
  there = storage.of(folder).content(folder / "a.jsonl")
  assert there.startswith(whole + b"1\n2\n")
  assert there.endswith(b"\n")


def test_removed_and_moved(folder: Path) -> None:
  store = storage.of(folder)
  store.make(folder)
  for name in ("3/params/d/x", "3/commit_success.txt", "30/y"):
    store.make((folder / name).parent)
    store.put(folder / name, name.encode())
  there = folders.rename_aside(folder / "3", folder / "aside")
  assert there == folder / "aside" / "3"
  assert (there / "params" / "d" / "x").read_bytes() == b"3/params/d/x"
  assert (there / "commit_success.txt").is_file()
  assert not (folder / "3").exists()
  assert (folder / "30" / "y").is_file()
  folders.remove(folder / "30")
  folders.remove(folder / "31")
  assert sorted(path.name for path in folder.iterdir()) == ["aside"]


def test_folders_come_and_go(folder: Path, tmp_path: Path) -> None:
  with storage.filled(folder / "tokenizer") as made:
    (made / "sub").mkdir()
    (made / "sub" / "a").write_text("one")
  local = storage.of(folder).local(folder / "tokenizer")
  assert (Path(local) / "sub" / "a").read_text() == "one"
  assert not storage.remote(local)
  one = peers.of_folder(folder)
  storage.of(folder).put(folder / "tokenizer" / "sub" / "a", b"two")
  assert peers.of_folder(folder) not in (one, "not there")
  assert peers.of_folder(folder / "nothing") == "not there"


def test_weights_in_a_bucket_are_copied_once(bucket: str, tmp_path: Path) -> None:
  there = storage.place(bucket) / tmp_path.name
  for name in ("config.json", "sub/model.safetensors"):
    storage.of(there).put(there / name, name.encode())
  copy = places.local(str(there))
  assert (copy / "sub" / "model.safetensors").read_bytes() == b"sub/model.safetensors"
  assert places.tokenizer(str(there)) == copy
  assert places.resolve(str(there), tmp_path, "--base") == copy
  storage.of(there).put(there / "config.json", b"new")
  assert (places.local(str(there)) / "config.json").read_bytes() == b"new"
  assert (copy / "config.json").read_bytes() == b"config.json"
  with pytest.raises(FileNotFoundError, match="no such object or folder"):
    places.local(f"{bucket}/nothing")


def test_lines_are_cut_off_and_go_on(folder: Path) -> None:
  storage.of(folder).make(folder)
  path = folder / "metrics.jsonl"
  for step in (1, 2, 3):
    jsonl.append(path, {"step": step})
  assert jsonl.cut_after(path, 1) == 0
  jsonl.append(path, {"step": 2, "again": True})
  assert jsonl.read(path) == ([{"step": 1}, {"step": 2, "again": True}], 0)


def test_ledger_and_quarantine(folder: Path) -> None:
  book = ledger.Ledger(folder, 0, [0, 1], [True, True])
  for step in (1, 2, 3):
    book.step(step, [4, -7])  # type: ignore[arg-type]
    book.secure()
  ledger.drop_after(folder, 2)
  assert [line["quarantined"] for line in ledger.read(folder)] == [[5], [5]]
  Quarantine(folder / "quarantine.jsonl").add(5, {"id": "x"}, ValueError("bad"))
  Quarantine(folder / "quarantine.jsonl", 1).add(6, {"id": "y"}, ValueError("bad"))
  storage.of(folder).flush()
  found = Quarantine(folder / "quarantine.jsonl")
  assert (5 in found, 6 in found, found.count) == (True, True, 2)
  assert (folder / "quarantine-00001.jsonl").is_file()


def test_a_second_process_is_refused_and_a_dead_one_replaced(folder: Path) -> None:
  code = (
    "import os, sys; from llava_sp_jax import locks, storage\n"
    "try:\n  locks.Lock(storage.place(sys.argv[1]), 'llava-sp train').__enter__()\n"
    "except locks.LockError as error:\n  print(error, flush=True)\n"
    "os.kill(os.getpid(), 9)"
  )
  with locks.Lock(folder, "llava-sp train") as lock:
    assert f"in use by llava-sp train (process {os.getpid()} on " in run(code, folder)
    lock.check()
  assert locks.read(folder) is None
  assert run(code, folder) == ""
  assert locks.read(folder) is not None
  with locks.Lock(folder, "llava-sp train"):
    assert locks.read(folder).process == os.getpid()  # type: ignore[union-attr]


def test_a_lock_beats_and_notices_that_it_was_taken_over(
  folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(locks, "BEAT", 0.05)
  with locks.Lock(folder, "llava-sp train") as lock:
    path = folder / locks.FILE
    first = path.read_bytes()
    wait = lock._done.wait
    assert any(wait(0.05) or path.read_bytes() != first for _ in range(200))
    other = {**json.loads(first), "token": "other", "host": "far"}
    for _ in range(200):  # a beat that has begun may still write over it
      storage.of(path).put(path, json.dumps(other).encode())
      if wait(0.1) or lock.lost:
        break
    with pytest.raises(locks.LockError, match="taken over by"):
      lock.check()


def test_addresses_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
  with pytest.raises(
    storage.StorageError, match="unknown scheme s3://; give a local folder, or gs"
  ):
    storage.place("s3://bucket/run")
  with pytest.raises(storage.StorageError, match="names no bucket"):
    storage.place("gs://")
  monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(storage.StorageError, match=r"needs the package gcsfs.*llava-sp-jax\[gcs\]"):
    storage.place("gs://bucket/run")


@pytest.mark.parametrize("text", ["", "runs/a", "/a//b", "C:/a", "a:b", "./gs"])
def test_local_paths_stay_as_they_are(text: str) -> None:
  assert storage.place(text) == Path(text)
  assert not storage.remote(text)


def test_a_pathlib_path_of_an_address_is_that_address(bucket: str) -> None:
  assert str(storage.place(Path(f"{bucket}/run"))) == f"{bucket}/run"
  assert storage.place(storage.place(f"{bucket}/run/")) == storage.place(bucket) / "run"


def test_a_bucket_that_cannot_be_reached(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
  """The errors of its libraries become one line that says what to do."""
  store = bucket_lib.Bucket("gs")
  monkeypatch.setattr(storage, "SCHEMES", {"gs": (store, "gcsfs", "gcs")})

  def refuse(*_: object) -> None:
    raise RuntimeError("no\ncredentials")

  monkeypatch.setattr(store._files, "info", refuse)
  said = r"config.json: cannot be reached \(RuntimeError: no credentials\); .*gcloud auth"
  with pytest.raises(storage.StorageError, match=said):
    storage.check(storage.place(bucket) / "run")


def test_a_large_file_is_read_at_any_offset(folder: Path) -> None:
  """Of any name; it is an error that names it when it is gone."""
  storage.of(folder).make(folder)
  for name in ("a.tar", "b c?#%\N{LATIN SMALL LETTER E WITH ACUTE}"):
    store, path = storage.of(folder), folder / name
    store.put(path, bytes(range(100)))
    file = store.opened(path)
    assert (file.size, file.read_at(3, 4)) == (100, bytes([3, 4, 5, 6]))
    assert (file.read_at(98, 9), file.read_at(100, 1)) == (bytes([98, 99]), b"")
    assert store.opened(path).version == file.version
  store.put(folder / "empty", b"")
  assert store.opened(folder / "empty").read_at(0, 5) == b""
  with pytest.raises(FileNotFoundError, match=r"gone"):
    store.opened(folder / "gone")
  if storage.remote(folder):  # on a disk, an open file stays
    store.remove(path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"no such object: '{path}'")):
      file.read_at(3, 4)


def test_a_connection_that_goes_silent_is_given_up(bucket: str, tmp_path: Path) -> None:
  """After a minute, here after a second, and the range is read again."""
  path = storage.place(f"{bucket}/{object_store.SILENT}/{tmp_path.name}/a")
  storage.of(path).put(path, bytes(range(100)))
  code = (
    "import os, sys, time; from llava_sp_jax import storage\n"
    "os.environ['TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS'] = '1'\n"
    "path = storage.place(sys.argv[1]); file = storage.of(path).opened(path)\n"
    "begun = time.monotonic(); print(file.read_at(3, 4), time.monotonic() - begun < 50)"
  )
  assert run(code, path) == f"{bytes([3, 4, 5, 6])!r} True\n"


def test_ranges_that_cannot_be_read(
  bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  """An object that has become shorter, and errors of the library, are named."""
  path = storage.place(f"{bucket}/{tmp_path.name}/a")
  store: Any = storage.of(path)
  store.put(path, bytes(100))
  file = store.opened(path)
  store.put(path, bytes(50))
  said = re.escape(f"has become shorter since it was opened: '{path}'")
  for start in (40, 60):
    with pytest.raises(OSError, match=said):
      file.read_at(start, 40)
  one = ranges.Ranges("gs")

  def refuse(_: str) -> None:
    raise ValueError("no\ncredentials")

  monkeypatch.setattr(one, "_opened", refuse)
  with pytest.raises(storage.StorageError, match=r"\(ValueError: no credentials\); .*gcloud auth"):
    one.begin(path, 0, 1)


def test_a_bucket_that_is_not_there(bucket: str) -> None:
  with pytest.raises(OSError, match=r"gs://other/a"):
    storage.of(storage.place("gs://other/a")).put(storage.place("gs://other/a"), b"")
  assert not files.is_regular(storage.place(f"{bucket}/nothing"))
