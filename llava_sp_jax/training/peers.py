"""Compares what the processes of a run were given: config, code, data, tokenizer, starting weights.

Every process tells what it has as `{key: value}`, before anything is computed. Small things are compared
whole, data and tokenizer by their hashes. Weights are compared by names, sizes, small files, and both
ends of large ones: reading all of them on every host would cost as much as loading them.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from llava_sp_jax import config as config_lib
from llava_sp_jax import locks, provenance
from llava_sp_jax.distributed import processes

OWN = ("config.data.threads", "config.data.processes", "config.train.sinks")  # of each host
SMALL = 1 << 20  # bytes of a file that is read whole
END = 1 << 16  # bytes that are read of both ends of a larger one
SHOWN = 4  # processes that a message names

Facts = dict[str, str]


def facts(config: config_lib.Config, inputs: Callable[[], Mapping[str, str]]) -> Facts:
  """What this process has; `inputs` gives fingerprints of what it reads.

  What cannot be read has the error as its value, so that it is named with its host.
  """
  found: Facts = {
    key: value for key, value in _values(config_lib.to_dict(config)) if key not in OWN
  }
  found |= {f"version of {name}": text for name, text in provenance.versions().items()}
  found["code"] = of_folder(Path(__file__).parents[1], "*.py")
  for key, value in _values(config_lib.to_dict(config.init), "config.init"):
    path = json.loads(value)
    found[f"{key} (contents)"] = of_folder(Path(path)) if path else ""
  try:
    found |= inputs()
  except Exception as error:  # whatever library reads them
    found["data"] = f"{type(error).__name__}: {error}"
  return found


def compare(mine: Facts) -> None:
  """Call it in every process alike. Raises: ConfigError in all of them, with all that differs."""
  said = processes.all_gather(json.dumps([socket.gethostname(), mine]), "settings are compared")
  lines = differences([tuple(json.loads(text)) for text in said])
  if lines:
    raise config_lib.ConfigError(
      "the processes of this run were not given the same:\n  "
      + "\n  ".join(lines)
      + "\nStart all with the same command, the same code and the same files."
    )


def differences(said: list[tuple[str, Facts]]) -> list[str]:
  """A line for each key on which (host, facts) of the processes do not agree."""
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
  """A short hash of a file, or of the files below a folder, as this module's docstring says."""
  if not path.exists():
    return "not there"
  files = sorted(path.rglob(pattern)) if path.is_dir() else [path]
  digest = hashlib.sha256()
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
