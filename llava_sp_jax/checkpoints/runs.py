"""Reads and writes the config of a run folder, and checks that a run may resume in it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_sp_jax import config as config_lib
from llava_sp_jax import folders, storage
from llava_sp_jax.checkpoints.on_disk import PLACE, about, damaged, listed, steps
from llava_sp_jax.errors import CheckpointError

CONFIG_FILE = "config.json"


def read_config(folder: str | Path) -> config_lib.Config:
  """Returns the config of a run from its config.json.

  Raises: CheckpointError when `folder` has none, or it is not the config of a run.
  """
  path = storage.place(folder) / CONFIG_FILE
  if not path.is_file():
    raise CheckpointError(
      f"{folder}: not a run folder (no {CONFIG_FILE}); give the --workdir of a training run, or "
      "the folder that llava-sp convert made of a checkpoint of others"
    )
  try:
    return config_lib.from_json(path.read_text())
  except (config_lib.ConfigError, UnicodeDecodeError) as error:
    raise CheckpointError(f"{path}: not the config of a run ({error})") from None


def write_config(folder: Path, config: config_lib.Config) -> None:
  """Writes the config of a run completely or not at all; makes the folder if need be."""
  store = storage.of(folder)
  store.make(folder)
  store.put(folder / CONFIG_FILE, config_lib.to_json(config).encode())


def check_folder(folder: Path) -> None:
  """Checks that `folder`, a `--workdir`, is absent, or holds a run or no files of one.

  Other files, such as the log of a launcher, may lie in it.

  Raises: CheckpointError for files that are not those of a training run, such as a converted
    checkpoint.
  """
  for place in (folder, *folder.absolute().parents) if not storage.remote(folder) else ():
    if place.is_symlink() and not place.exists():
      raise CheckpointError(f"--workdir {folder}: {place} is a link that leads nowhere")
    if place.exists() and not place.is_dir():
      raise CheckpointError(f"--workdir {folder}: {place} is a file; name a folder")
  storage.check(folder)
  other = f"--workdir {folder}: holds {{}}; name a new folder"
  if (folder / folders.MARK).exists():
    raise CheckpointError(other.format("what a conversion has not finished"))
  if not (folder / CONFIG_FILE).exists():
    if held := [name for name in (PLACE, "tokenizer") if (folder / name).exists()]:
      raise CheckpointError(other.format(f"{held[0]}, but no {CONFIG_FILE} of a run"))
    return
  try:
    read_config(folder)
  except CheckpointError as error:
    said = " ".join(str(error).split())[:240]
    raise CheckpointError(other.format(f"another {CONFIG_FILE} ({said})")) from None
  for step in steps(folder)[-1:]:
    if about(folder / PLACE / str(step)).get("stage") == "convert":
      raise CheckpointError(
        f"--workdir {folder}: holds a converted checkpoint; name a new folder, and this one in "
        "config.init.checkpoint"
      )


def check_config(folder: Path, config: config_lib.Config) -> None:
  """Raises CheckpointError with both values where `config` contradicts that of the run in `folder`.

  Accepts any config for a folder in which nothing was trained yet.
  """
  if not (folder / CONFIG_FILE).is_file() or not steps(folder):
    return  # nothing was trained yet
  if lines := config_lib.differences(config, read_config(folder), but_free=True):
    raise CheckpointError(
      f"{folder} was started with another config ('here' is yours, 'there' is the run's):\n  "
      + "\n  ".join(lines)
      + "\nGive the run's values to continue it, or another --workdir."
    )


Accept = Callable[[Path, dict[str, Any]], None]


def saved(folder: str | Path, accept: Accept | None = None) -> tuple[Path, dict[str, Any], int]:
  """Returns the newest usable checkpoint of a run: its folder of parameters, metadata, and step.

  `accept(place, about)` raises a CheckpointError for a checkpoint that it cannot use. Then the next
  older one is taken, and a warning on stderr says so. None accepts all complete ones.

  Raises: CheckpointError when no complete checkpoint can be used, with the problem of each.
  """
  config = read_config(folder)
  there = storage.absolute(storage.place(folder))
  problems = damaged(there)
  for step in reversed(steps(there)):
    place = there / PLACE / str(step)
    try:
      said = about(place)
      if accept:
        accept(place, said)
    except CheckpointError as error:
      problems[step] = str(error)
      continue
    if newer := {number: why for number, why in problems.items() if number > step}:
      print(
        f"llava-sp: WARNING: {folder}: {listed(newer)}; step {step} is used instead",
        file=sys.stderr,
        flush=True,
      )
    return place / "params", said, step
  if problems:
    raise CheckpointError(f"{folder}: no checkpoint can be used: {listed(problems)}")
  raise CheckpointError(f"{folder}: no checkpoint yet (run {config.name!r}); train it first")
