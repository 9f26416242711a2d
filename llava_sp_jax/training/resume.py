"""Where a run goes on: the step, the inputs that must be those of before, and the state itself.

By default that is the newest step whose values are what was saved. A step that cannot be used is named,
and moved to `aside/` in the run folder when training goes on from an older one. Nothing is removed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax import folders
from llava_sp_jax.checkpoints import manager, on_disk
from llava_sp_jax.distributed import processes
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.training.state import TrainState

DIGITS = 10  # of a step at most: steps are counted in 32 bits
ASIDE = "aside"  # in the run folder: steps that the run does not go on from

# What a run reads beside its config, by the name that it has in a checkpoint: what it is.
INPUTS = {"data": "data.path", "tokenizer": "data.tokenizer"}


@dataclasses.dataclass(frozen=True)
class Wish:
  """What a user asked for when a run goes on.

  `step` to go on from; None: the newest. `changed` names INPUTS that may be other ones than before.
  """

  step: int | None = None
  changed: frozenset[str] = frozenset()

  @classmethod
  def of(cls, step: str, changed: str) -> Wish:
    """From what was typed. Raises: ConfigError."""
    if step and not (step.isascii() and step.isdigit() and len(step) <= DIGITS):
      raise config_lib.ConfigError(f"--from-step: expected a step such as 500, found {step!r:.40}")
    names = frozenset(filter(None, changed.split(",")))
    for name in sorted(names):
      config_lib.lookup("--allow-changed", name, INPUTS)
    return cls(int(step) if step else None, names)


def first(folder: Path, wish: Wish) -> int:
  """The step that a run goes on from, 0 for its start. Changes nothing.

  A run that has gone back to `wish.step` and was stopped after it goes on from its newest step.

  Raises: CheckpointError when there is no such step, or none can be read.
  """
  whole, bad = on_disk.steps(folder), on_disk.damaged(folder)
  if wish.step is None:
    if bad and not whole:
      raise CheckpointError(
        f"{folder}: {on_disk.listed(bad)}; no other step is there. --from-step 0 trains anew"
      )
    return max(whole, default=0)
  if whole and about(folder, whole[-1]).get("from_step") == wish.step < whole[-1]:
    return whole[-1]
  if wish.step and wish.step not in whole:
    why = bad.get(wish.step, "it is not there")
    raise CheckpointError(
      f"--from-step {wish.step}: {why}; steps of {folder}: {', '.join(map(str, whole)) or 'none'}"
    )
  return wish.step


def about(folder: Path, step: int) -> dict[str, Any]:
  """What step `step` says of itself; {} for the start of a run."""
  return on_disk.about(folder / on_disk.PLACE / str(step)) if step else {}


def compare_inputs(
  folder: Path, step: int, inputs: Mapping[str, str], changed: frozenset[str]
) -> list[str]:
  """Compares fingerprints of INPUTS with those that step `step` was trained on.

  Returns the names of those that differ and may.

  Raises: CheckpointError that shows both values of those that differ and may not.
  """
  known = about(folder, step).get("inputs", {})
  if step and not known:
    _say(f"{folder}: step {step} does not say what data it was trained on; they are not compared")
  other = [name for name in INPUTS if known.get(name, inputs[name]) != inputs[name]]
  if refused := [name for name in other if name not in changed]:
    raise CheckpointError(
      f"{folder}: was trained on something else until step {step}: "
      + "; ".join(
        f"{name} ({INPUTS[name]}) has fingerprint {inputs[name]} here, {known[name]} there"
        for name in refused
      )
      + f". Restore it, or go on with the new one: --allow-changed {','.join(refused)}"
    )
  for name in other:
    _say(f"{folder}: WARNING: {name} is not what it was until step {step}, as allowed")
  return other


def make_way(folder: Path, step: int) -> None:
  """Moves newer steps than `step`, and what is no checkpoint, aside; for one process alone."""
  bad = on_disk.damaged(folder)
  for number in sorted({*on_disk.steps(folder), *bad}):
    if number > step or number in bad:
      _set_aside(folder, number, bad.get(number, f"training goes on from step {step}"))


def _set_aside(folder: Path, number: int, why: str) -> None:
  place = folder / on_disk.PLACE / str(number)
  there = folders.rename_aside(place, folder / ASIDE)
  _say(f"{folder}: WARNING: step {number}: {why}; it is kept in {there}")


def restore(
  checkpoints: manager.Checkpoints, fresh: TrainState, base: str, folder: Path, wish: Wish
) -> TrainState:
  """The state of the newest step that can be read; `fresh` when there is no step yet.

  Processes agree on the step. Older steps are tried unless `wish` names one.

  Raises: CheckpointError when the base is another one than `base`, or no step can be read.
  """
  bad: dict[int, str] = {}
  for number in reversed(on_disk.steps(folder)):

    def read(number: int = number) -> tuple[int, Any, Any, Any]:
      return checkpoints.restore(fresh.trainable, fresh.opt_state, number)

    try:
      found = processes.collective(f"step {number} is restored", read)
    except (CheckpointError, processes.PeerError) as error:
      bad[number] = str(error)
      if wish.step == number:
        break
      continue
    assert found is not None
    _, trainable, opt_state, said = found
    if said["fingerprint"] != base:
      raise CheckpointError(
        f"{folder}: its frozen base has fingerprint {said['fingerprint']}, the one named by this "
        f"config has {base}; give the base it was trained with (config.init)"
      )
    if bad:
      _leave_behind(checkpoints, folder, bad)
    if not on_disk.checksums(folder / on_disk.PLACE / str(number)):
      _say(f"{folder}: step {number} was saved without checksums; its values are not verified")
    _say(f"continuing {folder} from step {number}")
    place = jax.device_put(fresh.step + number, fresh.step.sharding)
    return fresh.replace(step=place, trainable=trainable, opt_state=opt_state)
  if bad:
    raise CheckpointError(f"{folder}: {on_disk.listed(bad)}. --from-step 0 trains anew")
  return fresh


def _leave_behind(checkpoints: manager.Checkpoints, folder: Path, bad: Mapping[int, str]) -> None:
  def move() -> None:
    for number, why in sorted(bad.items()):
      _set_aside(folder, number, why)

  processes.collective("steps are set aside", move, only=0)
  checkpoints.reload()


def _say(line: str) -> None:
  if jax.process_index() == 0:
    stream = sys.stderr if "WARNING" in line else sys.stdout
    print(line, file=stream, flush=True)
