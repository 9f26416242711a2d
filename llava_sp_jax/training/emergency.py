"""Resumes a run from the disks of its hosts, if all of them hold the same step whole.

`train.local_folder` names a folder on the disk of each host. What is written there is newer than the
checkpoints in the run folder, and is lost with the host: then all resume from the run folder.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax import storage
from llava_sp_jax.checkpoints.local import Local
from llava_sp_jax.distributed import processes
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.training.state import TrainState

ID_FILE = "local_id.txt"  # in the run folder; a new run in a folder of that name has another one


def open_local(config: config_lib.Config, folder: Path) -> Local | None:
  """Opens what the disk of this host has of the run in `folder`; None without `train.local_folder`.

  Every process must call it.
  """
  if not config.train.local_folder:
    return None
  mine = ""
  if jax.process_index() == 0:
    mine = storage.of(folder).content(folder / ID_FILE).decode() or secrets.token_hex(8)
  said = processes.all_gather(json.dumps([mine, secrets.token_hex(4)]), "the run has a name")
  run, start = json.loads(said[0])
  return Local(config.train.local_folder, run, start)


def opened(
  config: config_lib.Config, folder: Path, saved: int, newer: bool
) -> tuple[Local | None, int, config_lib.Config]:
  """Opens what this host has, and finds the step to resume from; every process must call it.

  `saved` is the newest step in the run folder, and `newer` says whether a newer one may be used.

  Returns: what is here (None without `train.local_folder`), the step, and the config with the steps
    of its run.
  """
  local = open_local(config, folder)
  if not local or not newer:
    return local, saved, config
  return local, *newest(local, config, folder, saved)


def said(local: Local | None, step: int, first: int) -> dict[str, Any]:
  """Returns what local step `step` says of itself, if the run continues from it at `first`; else {}."""
  return local.held().get(first, {}) if local and step == first else {}


def name_run(local: Local | None, folder: Path) -> None:
  """Writes the name by which `open_local` finds a run again; called by process 0 alone."""
  if local:
    storage.of(folder).put(folder / ID_FILE, local.run.encode())


def newest(
  local: Local, config: config_lib.Config, folder: Path, step: int
) -> tuple[int, config_lib.Config]:
  """Returns the newest step that all processes hold whole, and the config with the steps of its run.

  Returns `step`, the newest one in the run folder, if no local one is newer. Every process must call
  it. A line says so if only some of the processes have a newer one.
  """
  usable = {
    number: fitted
    for number, said in local.held().items()
    if number > step and (fitted := _fitted(config, said))
  }
  starts = {number: local.held()[number]["start"] for number in usable}
  every = [json.loads(text) for text in processes.all_gather(json.dumps(starts), "local steps")]
  if others := {n: count for n, count in local.of_others().items() if n > step}:
    _say(
      f"{folder}: WARNING: step {max(others)} on the disks of its hosts is of {others[max(others)]} "
      f"processes, now there are {jax.process_count()}; it is not used, and removed"
    )
  shared = [n for n in starts if all(found.get(str(n)) == starts[n] for found in every)]
  if shared:
    return max(shared), usable[max(shared)]
  if any(every) and jax.process_index() == 0:
    most = max(int(number) for found in every for number in found)
    without = [i for i, found in enumerate(every) if found.get(str(most)) is None]
    who = f"process {', '.join(map(str, without[:4]))} has not" if without else "starts differ"
    _say(f"{folder}: step {most} is not on the disks of all hosts ({who}); step {step} is used")
  return step, config


def _fitted(config: config_lib.Config, said: dict[str, Any]) -> config_lib.Config | None:
  """Returns the config with the steps of the run that a local step is of; None if it is another."""
  theirs = config_lib.from_dict(said["config"])
  if config.train.epochs and config.train.epochs == theirs.train.epochs:
    train = dataclasses.replace(config.train, steps=theirs.train.steps)
    config = dataclasses.replace(config, train=train)
  return None if config_lib.differences(config, theirs, but_free=True) else config


def save(
  local: Local,
  step: int,
  train_state: TrainState,
  about: Mapping[str, Any],
  secure: Callable[[], None],
) -> None:
  """Keeps a step on the disk of this host; every process must call it.

  `secure` writes what the run folder must have before it. Where that fails in any process, because a
  disk or a bucket cannot be reached, no process keeps the step, a line says so, and training goes on.
  """
  failed = ""
  try:
    secure()
  except OSError as error:
    failed = str(error)
  said = processes.all_gather(failed, "a local step is secured")
  if problems := [f"process {i}: {text}" for i, text in enumerate(said) if text]:
    _say(f"WARNING: {problems[0]}; step {step} is not kept on the disks of the hosts")
  local.save(step, train_state.trainable, train_state.opt_state, about, not problems)


def restore(
  local: Local | None, step: int, fresh: TrainState, base: str, folder: Path
) -> TrainState | None:
  """Returns the state of `step` from the disks of all hosts; None, with a line, if it is damaged.

  None, too, if `step` is 0 or nothing is kept there. Every process must call it. `fresh` is the state of step 0, and `base` the fingerprint of its
  frozen parameters.
  """

  if not local or not step:
    return None

  def read() -> tuple[Any, Any]:
    if (found := local.held()[step]["fingerprint"]) != base:
      raise CheckpointError(f"its frozen base has fingerprint {found}, that of now is {base}")
    return local.read(step, fresh.trainable, fresh.opt_state)

  try:
    found = processes.collective(f"local step {step} is read", read)
    assert found
    local.verify(step, *found)
  except (CheckpointError, processes.PeerError) as error:
    _say(f"{folder}: WARNING: local step {step} cannot be used ({error}); the run folder's is used")
    return None
  _say(f"continuing {folder} from step {step}, which is on the disks of its hosts")
  place = jax.device_put(fresh.step + step, fresh.step.sharding)
  trainable, opt_state = found
  return fresh.replace(step=place, trainable=trainable, opt_state=opt_state)


def _say(line: str) -> None:
  if jax.process_index() == 0:
    print(line, file=sys.stderr if "WARNING" in line else sys.stdout, flush=True)
