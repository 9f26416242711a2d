"""Compares what the processes of a run were given: config, code, data, tokenizer, starting weights.

Before anything is computed, each process states what it has as `{key: value}`. Small values are
compared whole, data and tokenizer by their fingerprints. Folders of weights are compared by file
names, sizes, the contents of small files, and both ends of large ones: reading them whole would
cost as much as loading them.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax import locks, provenance, storage
from llava_sp_jax.data.usable import Usable
from llava_sp_jax.distributed import processes
from llava_sp_jax.errors import CheckpointError

OWN = ("config.data.threads", "config.data.processes", "config.train.sinks")  # may differ by host
SMALL = 1 << 20  # bytes; larger files are not read whole
END = 1 << 16  # bytes that are read at each end of a larger file
SHOWN = 4  # the most processes that a message names for one value

Facts = dict[str, str]


def facts(config: config_lib.Config, inputs: Callable[[], Mapping[str, str]]) -> Facts:
  """Returns what this process was given, as `{key: value}`.

  `inputs` returns the fingerprints of the data that are read. If it raises, the error is the value
  of `data`, so that the comparison names it with its host.
  """
  found: Facts = {
    key: value for key, value in _values(config_lib.to_dict(config)) if key not in OWN
  }
  found |= {f"version of {name}": text for name, text in provenance.versions().items()}
  found["code"] = of_folder(Path(__file__).parents[1], "*.py")
  for key, value in _values(config_lib.to_dict(config.init), "config.init"):
    path = json.loads(value)
    found[f"{key} (contents)"] = of_folder(storage.place(path)) if path else ""
  try:
    found |= inputs()
  except Exception as error:  # any error of the libraries that read them
    found["data"] = f"{type(error).__name__}: {error}"
  return found


def compare(mine: Facts) -> None:
  """Compares `mine`, the facts of this process, with those of all others.

  Every process must call it.

  Raises: ConfigError in all processes, with every difference.
  """
  said = processes.all_gather(json.dumps([socket.gethostname(), mine]), "settings are compared")
  lines = differences([tuple(json.loads(text)) for text in said])
  if lines:
    raise config_lib.ConfigError(
      "the processes of this run were not given the same:\n  "
      + "\n  ".join(lines)
      + "\nStart all with the same command, the same code and the same files."
    )


def compare_folders(folder: Path, lock: locks.Lock) -> None:
  """Compares the run folder that this process sees with that of process 0, which holds its `lock`.

  Every process must call it.

  Raises: CheckpointError where the lock is not seen, PeerError in the other processes.
  """
  token = processes.agreed("the lock is told", lambda: lock.token)

  def look() -> None:
    if not locks.shows(folder, token):
      raise CheckpointError(
        f"--workdir {folder}: on {socket.gethostname()}, the lock that process 0 has just made is "
        "not there; all processes need one folder, on a disk that they share or in a bucket"
      )

  processes.collective("the run folder is seen", look)


def compare_samples(usable: Usable) -> None:
  """Compares the sizes of samples from which the processes have planned their rows so far.

  A later epoch is measured by each process alone, where samples draw other turns. Every process must
  call it, before a checkpoint is saved.

  Raises: CheckpointError in all processes, if any size differs.
  """
  if jax.process_count() == 1:
    return
  every = [
    json.loads(text)
    for text in processes.all_gather(json.dumps(usable.digests()), "samples are compared")
  ]
  for key in sorted(set.intersection(*map(set, every))):
    if len({found[key] for found in every}) > 1:
      raise CheckpointError(
        "data: the processes have measured the samples of an epoch differently, as when one of them "
        "cannot read a picture for a while, so their rows are not of one plan. Nothing is saved; "
        "the same command resumes from the last checkpoint"
      )


def differences(said: list[tuple[str, Facts]]) -> list[str]:
  """Returns a line for each key whose value differs among processes; [] if none does.

  `said` has the (host name, facts) of each process, in their order. A line names the processes of
  each value.
  """
  lines = []
  for key in sorted({key for _, found in said for key in found}):
    holders: dict[str, list[str]] = {}
    for process, (host, found) in enumerate(said):
      holders.setdefault(found.get(key, "absent"), []).append(f"{process} ({host})")
    if len(holders) > 1:
      shown = [f"{value} in process {_named(who)}" for value, who in holders.items()]
      lines.append(f"{key}: {'; '.join(shown)}")
  return lines


def _named(who: list[str]) -> str:
  more = f" and {len(who) - SHOWN} more" if len(who) > SHOWN else ""
  return ", ".join(who[:SHOWN]) + more


def _values(values: Mapping[str, object], prefix: str = "config") -> Iterator[tuple[str, str]]:
  for name, value in values.items():
    if isinstance(value, dict):
      yield from _values(value, f"{prefix}.{name}")
    else:
      yield f"{prefix}.{name}", json.dumps(value)


def of_folder(path: Path, pattern: str = "*") -> str:
  """Returns a hash of a file, or of the files below a folder that match `pattern`, in 16 digits.

  It covers names, sizes and contents, but only the first and last 64 KiB of files above 1 MiB, and
  the checksums that a bucket has of its objects. A path that does not exist gives "not there".
  """
  if not path.exists():
    return "not there"
  digest = hashlib.sha256()
  if versions := storage.of(path).versions(path):
    digest.update(json.dumps({n: v for n, v in versions.items() if n != f"/{locks.FILE}"}).encode())
    return digest.hexdigest()[:16]
  files = sorted(path.rglob(pattern)) if path.is_dir() else [path]
  for file in files:
    if not file.is_file() or file.name == locks.FILE:
      continue
    size = file.stat().st_size
    name = str(file.relative_to(path)) if file != path else file.name
    digest.update(f"{name} {size}\n".encode(errors="surrogateescape"))
    with file.open("rb") as content:
      if size <= SMALL:
        digest.update(content.read())
      else:
        digest.update(content.read(END))
        content.seek(-END, os.SEEK_END)
        digest.update(content.read(END))
  return digest.hexdigest()[:16]
