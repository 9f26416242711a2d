"""Reads and writes predictions, which survive a kill and may come from several hosts.

A result folder has `settings.json` (the settings of every answer in it), `predictions*.jsonl` with
the answers of each part, and `sessions*.jsonl` with statistics. A part is the share of the
questions that one process asks. A question with an answer in any of these files is not asked again,
so a different number of hosts may complete a folder.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax import files as regular
from llava_sp_jax import jsonl, locks, storage
from llava_sp_jax.json_files import NUMBER, fits
from llava_sp_jax.tasks.task import EvalError, Item, Prediction

FILE, SETTINGS = "predictions.jsonl", "settings.json"
PARTS = "predictions*.jsonl"

Record = dict[str, Any]
# Keys of a line of predictions, and the types of their values.
FIELDS = {"id": str, "question": str, "images": [str], "kind": str, "truth": object, "text": str,
          "error": str, "verdict": dict}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Part:
  """Identifies the questions that one process asks: part `index` of `count`.

  Raises: EvalError for an index outside of 0 .. count - 1.
  """

  index: int = 0
  count: int = 1

  def __post_init__(self) -> None:
    if not 0 <= self.index < self.count:
      raise EvalError(f"part {self.index}/{self.count}: parts are counted from 0/N to N-1/N")

  def __str__(self) -> str:
    return f"{self.index}/{self.count}"

  def named(self, stem: str) -> str:
    """Returns the file name of this part: `stem.jsonl`, or `stem.0-of-2.jsonl`."""
    return f"{stem}.jsonl" if self.count == 1 else f"{stem}.{self.index}-of-{self.count}.jsonl"

  def choose(self, items: Sequence[Item]) -> list[Item]:
    """Returns the items of this part.

    Keeps questions with the same images in one part, so that no image is encoded twice. Distributes
    questions without an image one by one.
    """
    if self.count == 1:
      return list(items)
    keys = [image_names(item) or (item.id,) for item in items]
    sizes = collections.Counter(keys)
    loads = [0] * self.count
    owner: dict[tuple[str, ...], int] = {}
    for key, size in sizes.items():  # the part with the fewest questions gets the next image
      owner[key] = loads.index(min(loads))
      loads[owner[key]] += size
    return [item for item, key in zip(items, keys, strict=True) if owner[key] == self.index]


def parse_part(text: str) -> Part:
  """Parses a part such as `0/2`, the first of two. Raises: EvalError for anything else."""
  found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
  if not found:
    raise EvalError(f"--part: expected I/N such as 0/2, found {text!r}")
  return Part(int(found[1]), int(found[2]))


def image_names(item: Item) -> tuple[str, ...]:
  """Returns the path of each image of an item, or `sha256:...` for one that is given as bytes."""
  return tuple(
    f"sha256:{hashlib.sha256(image).hexdigest()[:16]}" if isinstance(image, bytes) else str(image)
    for image in item.images
  )


def check_folder(folder: Path) -> None:
  """Checks that results can be written to `folder`, which need not exist.

  Raises: EvalError if they cannot.
  """
  storage.check(folder)
  if not storage.remote(folder):
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not place.is_dir():
      raise EvalError(f"{folder}: {place} is no folder; name another one with --out")
    if not os.access(place, os.W_OK | os.X_OK):
      raise EvalError(f"{folder}: nothing can be written in {place}; name another one with --out")
  _check_files(folder)


def _check_files(folder: Path) -> None:
  """Raises: EvalError for a pipe or another irregular file in place of a file of results."""
  patterns = (PARTS, "sessions*.jsonl", SETTINGS, "scores.json")
  for path in sorted(folder.iterdir()) if folder.is_dir() else ():
    if any(map(path.match, patterns)) and not regular.is_regular(path):
      raise EvalError(f"{path}: expected a regular file; move away what is there")


def check_settings(folder: Path, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
  """Writes `settings.json` of a new folder, or compares `settings` with those of a begun one.

  `about` is written beside the settings and is not compared.

  Raises: EvalError that lists all differences, or for a folder with predictions and no settings.
  """
  storage.of(folder).make(folder)
  _check_files(folder)
  path = folder / SETTINGS
  wanted = json.loads(json.dumps({"settings": settings, "about": about}))
  begun = _begun(folder)
  # A damaged file of settings is replaced while there are no answers.
  new = not path.is_file() or (not begun and not _is_valid(path))
  if new:  # checks the file again: another part writes its settings before its answers
    if begun and not path.is_file():
      raise EvalError(
        f"{begun[0]}: predictions without {SETTINGS}, so nobody knows what they were made with; "
        "name another folder with --out, or move them away"
      )
    replace(path, json.dumps(wanted, indent=2) + "\n")
  there = read_settings(folder)["settings"]
  lines = differences(wanted["settings"], there)
  if lines:
    raise EvalError(
      f"{folder} holds answers made with other settings ('here' is what you ask for, 'there' the "
      f"folder's): {'; '.join(lines)}. Continue with the folder's settings, or name another folder "
      "with --out (or delete this one)."
    )


def _begun(folder: Path) -> list[Path]:
  """Returns the files of predictions that are not empty."""
  return [path for path in sorted(folder.glob(PARTS)) if storage.of(path).content(path)]


def read_settings(folder: Path) -> dict[str, Any]:
  """Reads `{"settings", "about"}` of a result folder; renames old keys of the model.

  Raises: EvalError for a folder without settings, or with a damaged file.
  """
  _check_files(folder)
  path = folder / SETTINGS
  if not path.is_file():
    raise EvalError(f"{folder}: no {SETTINGS}; give the --out of llava-sp eval")
  if not _is_valid(path):
    raise EvalError(
      f"{path}: damaged, so nobody knows what the answers beside it were made with; put it back from "
      "a copy, or name another folder with --out"
    )
  found = json.loads(path.read_bytes())
  if isinstance(model := found["settings"].get("model"), dict):  # like a run's config
    found["settings"]["model"] = config_lib.renamed(model, config_lib.ModelConfig, "model")
  result: dict[str, Any] = found
  return result


def _is_valid(path: Path) -> bool:
  """Returns whether a file of settings can be read."""
  found = read_json(path) or {}
  return all(isinstance(found.get(key), dict) for key in ("settings", "about"))


def read_json(path: Path) -> dict[str, Any] | None:
  """Reads the JSON object of a file; returns None for any other content."""
  try:
    found = json.loads(path.read_bytes())
  except (ValueError, RecursionError):
    return None
  return found if isinstance(found, dict) else None


def read_sessions(folder: Path) -> tuple[list[dict[str, Any]], int]:
  """Reads the statistics of a folder's sessions: seconds, and counters of the engine.

  Returns also how many lines cannot be read; those are left out and reported.
  """
  found, torn = [], 0
  for path in sorted(folder.glob("sessions*.jsonl")):
    for _, value in jsonl.values(storage.of(path).content(path).split(b"\n")):
      if fits(value, {"seconds": NUMBER, "engine": dict}) and all(
        fits(count, NUMBER) for count in value["engine"].values()
      ):
        counts = {name: int(count) for name, count in value["engine"].items()}
        found.append({"seconds": float(value["seconds"]), "engine": counts})
      else:
        torn += 1
  if torn:
    print(
      f"{folder}: {torn} lines of sessions*.jsonl could not be read and are left out of `engine` "
      "and `seconds`",
      flush=True,
    )
  return found, torn


def append(path: Path, record: Record) -> None:
  """Appends a line to a file, and secures it; starts a new line if the last one is incomplete."""
  store = storage.of(path)
  torn = store.content(path)[-1:] not in (b"", b"\n")
  store.append(path, ("\n" * torn + json.dumps(record) + "\n").encode())
  store.secure(path)


def differences(here: Mapping[str, Any], there: Mapping[str, Any], at: str = "") -> list[str]:
  """Returns a line for each value in which two settings differ; [] if none does.

  `at` is the prefix of the keys in the lines.
  """
  lines = []
  for key in dict.fromkeys([*here, *there]):
    a, b = here.get(key), there.get(key)
    if isinstance(a, dict) and isinstance(b, dict):
      lines += differences(a, b, f"{at}{key}.")
    elif a != b:
      lines.append(f"{at}{key}: {a!r} here, {b!r} there")
  return lines


def read(folder: Path) -> dict[str, Record]:
  """Reads the answers of all parts in a folder, as {id: record}.

  Prefers an answer without an error, and then one of the merged file, whose verdicts are the
  latest. Skips a last line that a kill left incomplete.

  Raises: EvalError for any other line that is not a record.
  """
  found: dict[str, Record] = {}
  for path in sorted(folder.glob(PARTS), key=lambda path: (path.name != FILE, path.name)):
    for record in read_file(path):
      if record["id"] not in found or found[record["id"]]["error"]:
        found[record["id"]] = record
  return found


def read_file(path: Path) -> list[Record]:
  """Reads the complete lines of one file of predictions.

  Raises: EvalError for a line that is not a record.
  """
  records = []
  for number, record in jsonl.values(storage.of(path).content(path).split(b"\n")[:-1]):
    if not fits(record, FIELDS) or not fits(record["verdict"].get("score", 0), NUMBER):
      raise EvalError(
        f"{path}, line {number}: expected an answer with {', '.join(FIELDS)}, found "
        f"{record!r:.60}; take this line out, and its question is asked again"
      )
    records.append(record)
  return records


def as_predictions(records: Iterable[Record]) -> dict[str, Prediction]:
  """Converts records, lines of predictions.jsonl, to {id: Prediction}, which tasks score."""
  return {r["id"]: Prediction(r["id"], r["text"], r["error"]) for r in records}


class PredictionWriter(contextlib.AbstractContextManager["PredictionWriter"]):
  """Appends to the predictions of one part, each line in one unbuffered write.

  A kill therefore loses at most the line that is being written; in a bucket, the answers of the
  last 15 seconds.
  """

  def __init__(self, folder: Path, part: Part):
    """Opens and locks the file of a part, and removes an incomplete last line.

    Raises: EvalError or LockError when another process writes the same part.
    """
    self._path = folder / part.named("predictions")
    self._store, self._held = storage.of(self._path), contextlib.ExitStack()
    if storage.remote(folder):
      beside = folder / part.named("lock").removesuffix(".jsonl")
      self._held.enter_context(locks.Lock(beside, "llava-sp eval"))
    else:
      self._held.enter_context(_flocked(self._path))

  def write(self, record: Record) -> None:
    """Appends a record as one line."""
    self._store.append(self._path, json.dumps(record).encode() + b"\n")

  def __exit__(self, *_: object) -> None:
    with self._held:
      self._store.secure(self._path)


@contextlib.contextmanager
def _flocked(path: Path) -> Iterator[None]:
  """Locks a file of predictions on a disk for a block, and removes an incomplete last line."""
  with path.open("ab", buffering=0) as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise EvalError(
        f"{path}: another process is writing it; wait for that one, or give each its --part I/N"
      ) from None
    except OSError:  # a file system without locks
      pass
    os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    yield


def put_in_order(folder: Path, items: Sequence[Item], records: Mapping[str, Record]) -> None:
  """Writes all answers to `predictions.jsonl`, in the order of the items; others come last.

  `records` are the answers by id.
  """
  known = [item.id for item in items if item.id in records]
  ids = dict.fromkeys([*known, *records])
  replace(folder / FILE, "".join(json.dumps(records[i]) + "\n" for i in ids))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
  """Locks a result folder for a block, so that one process at a time merges it.

  Does nothing in a bucket, or on a file system without locks. There, two may write the same files.
  """
  if storage.remote(folder):
    yield
    return
  with (folder / SETTINGS).open("rb") as file:
    with contextlib.suppress(OSError):
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def replace(path: Path, text: str) -> None:
  """Writes `text` to a file atomically, so that no reader sees a part of it."""
  storage.of(path).put(path, text.encode("utf-8", "backslashreplace"))
