"""Decides where a run resumes: the step, the inputs that must not have changed, and the state.

By default, that is the newest step whose values match their checksums. A step that cannot be used
is reported, and moved to `aside/` in the run folder when training resumes from an older one.
Nothing is deleted.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax import folders
from llava_sp_jax.checkpoints import manager, on_disk, runs
from llava_sp_jax.data import mixture
from llava_sp_jax.distributed import processes
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.training.inputs import Inputs
from llava_sp_jax.training.state import TrainState

DIGITS = 10  # the most digits of a step, which is counted in 32 bits
ASIDE = "aside"  # folder in the run folder for steps that the run does not resume from

# What a run reads beside its config: {name in a checkpoint: config field}.
INPUTS = {"data": "data.path", "tokenizer": "data.tokenizer", "mixture": "data.mixture"}


@dataclasses.dataclass(frozen=True)
class ResumeOptions:
  """Holds what a user asked for when a run resumes.

  `step` is the step to resume from; None is the newest. `changed` names the inputs of
  INPUTS that may differ from those of before.
  """

  step: int | None = None
  changed: frozenset[str] = frozenset()

  @classmethod
  def of(cls, step: str, changed: str) -> ResumeOptions:
    """Parses the values of --from-step and --allow-changed (names with commas); "" is the default.

    Raises: ConfigError for a step that is no number, or a name that is not in INPUTS.
    """
    if step and not (step.isascii() and step.isdigit() and len(step) <= DIGITS):
      raise config_lib.ConfigError(f"--from-step: expected a step such as 500, found {step!r:.40}")
    names = frozenset(filter(None, changed.split(",")))
    for name in sorted(names):
      config_lib.lookup("--allow-changed", name, INPUTS)
    return cls(int(step) if step else None, names)


def begin(
  folder: Path, config: config_lib.Config, options: ResumeOptions
) -> tuple[config_lib.Config, int]:
  """Returns the config with the steps of the run in `folder`, and the step that it resumes from.

  Every process must call it: what process 0 sees counts. Changes nothing on disk.

  Raises: CheckpointError for another config than that of the run, or a step that cannot be read;
    PeerError when process 0 has raised it.
  """

  def look() -> list[int]:
    known = with_steps_of(folder, config)
    runs.check_config(folder, known)
    return [known.train.steps, first(folder, options)]

  steps, step = processes.agreed("the step to begin with is found", look)
  return _with_steps(config, steps), step


def with_steps_of(folder: Path, config: config_lib.Config) -> config_lib.Config:
  """Returns the config with the steps of the run in `folder`, where `train.epochs` gave them.

  Otherwise, or before the first checkpoint, returns it as it is.
  """
  if not config.train.epochs or not on_disk.steps(folder):
    return config
  there = runs.read_config(folder).train
  same = there.epochs == config.train.epochs
  return _with_steps(config, there.steps) if same else config


def with_steps_for(config: config_lib.Config, rows: int) -> config_lib.Config:
  """Returns the config with the steps of `train.epochs`, if that is above 0.

  `rows` are those of the first epoch. The last batch counts as one, even if rows of the next epoch
  complete it.
  """
  if not config.train.epochs:
    return config
  return _with_steps(config, math.ceil(config.train.epochs * rows / config.train.batch_size))


def _with_steps(config: config_lib.Config, steps: int) -> config_lib.Config:
  return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def first(folder: Path, options: ResumeOptions) -> int:
  """Returns the step that a run resumes from, 0 for its start; changes nothing on disk.

  A run that has already gone back to `options.step`, and was stopped after it, resumes from its
  newest step.

  Raises: CheckpointError when there is no such step, or no step can be read.
  """
  whole, bad = on_disk.steps(folder), on_disk.damaged(folder)
  if options.step is None:
    if bad and not whole:
      raise CheckpointError(
        f"{folder}: {on_disk.listed(bad)}; no other step is there. --from-step 0 trains anew"
      )
    return max(whole, default=0)
  if whole and about(folder, whole[-1]).get("from_step") == options.step < whole[-1]:
    return whole[-1]
  if options.step and options.step not in whole:
    why = bad.get(options.step, "it is not there")
    raise CheckpointError(
      f"--from-step {options.step}: {why}; steps of {folder}: "
      f"{', '.join(map(str, whole)) or 'none'}"
    )
  return options.step


def about(folder: Path, step: int) -> dict[str, Any]:
  """Returns what the checkpoint of `step` records about itself; {} for step 0.

  Raises: CheckpointError when its metadata cannot be read.
  """
  return on_disk.about(folder / on_disk.PLACE / str(step)) if step else {}


def compare_inputs(
  folder: Path,
  step: int,
  now: Inputs,
  changed: frozenset[str],
  known: Mapping[str, Any] | None = None,
) -> list[str]:
  """Compares the fingerprints of the inputs with those that step `step` was trained on.

  Args:
    folder: the run folder.
    step: the step to resume from.
    now: the fingerprints of now.
    changed: names of the inputs that may differ.
    known: what the step says of itself; None reads it from its checkpoint.

  Returns: the names of the inputs that differ, all of them in `changed`.
  Raises: CheckpointError with both fingerprints of those that differ and are not in `changed`.
  """
  known = about(folder, step) if known is None else known
  if step and not known.get("inputs"):
    _say(f"{folder}: step {step} does not say what data it was trained on; they are not compared")
  other = _differences(known, now)
  if refused := [name for name in other if name not in changed]:
    raise CheckpointError(
      f"{folder}: was trained on something else until step {step}: "
      + "; ".join(f"{name} ({INPUTS[name]}){other[name]}" for name in refused)
      + f". Restore it, or train on with the new one: --allow-changed {','.join(refused)}"
    )
  for name in other:
    _say(f"{folder}: WARNING: {name} is not what it was until step {step}, as allowed")
  return list(other)


def _differences(known: Mapping[str, Any], now: Inputs) -> dict[str, str]:
  """Returns {name of an input that differs from what a checkpoint knows: how}."""
  there = known.get("inputs", {})
  mixed = known.get("mixture", {}).get("sources", {})
  found = {
    name: f" has fingerprint {value} here, {there[name]} there"
    for name, value in now.now.items()
    if name in there and there[name] not in (value, now.former.get(name))
  }
  if now.mixture and mixed:  # source by source
    found.pop("data", None)
    lines = mixture.differences(now.mixture, mixed)
    found |= {name: f": {'; '.join(said)}" for name, said in lines.items()}
  return found


def set_newer_aside(folder: Path, step: int) -> None:
  """Moves checkpoints of steps after `step`, and damaged ones, to aside/ in the run folder.

  Removes what a killed save has left in a bucket. Called by one process alone.
  """
  for place in on_disk.unfinished(folder):
    folders.remove(place)
  bad = on_disk.damaged(folder)
  for number in sorted({*on_disk.steps(folder), *bad}):
    if number > step or number in bad:
      _set_aside(folder, number, bad.get(number, f"training resumes from step {step}"))


def _set_aside(folder: Path, number: int, why: str) -> None:
  place = folder / on_disk.PLACE / str(number)
  there = folders.rename_aside(place, folder / ASIDE)
  _say(f"{folder}: WARNING: step {number}: {why}; it is kept in {there}")


def restore(
  checkpoints: manager.Checkpoints,
  fresh: TrainState,
  base: str,
  folder: Path,
  options: ResumeOptions,
) -> TrainState:
  """Returns the state of the newest step that can be read, or `fresh` if there is none.

  All processes restore the same step. If a step cannot be read, older ones are tried, unless
  `options` names a step.

  Args:
    checkpoints: those of the run.
    fresh: the state of step 0, with its frozen parameters.
    base: fingerprint of the frozen parameters.
    folder: the run folder.
    options: the step to resume from, if the user named one.

  Raises: CheckpointError when the run was trained on another base, or no step can be read.
  """
  bad: dict[int, str] = {}
  for number in reversed(processes.agreed("steps are listed", lambda: on_disk.steps(folder))):
    try:
      _, trainable, opt_state, said = checkpoints.restore(fresh.trainable, fresh.opt_state, number)
    except (CheckpointError, processes.PeerError) as error:
      bad[number] = str(error)
      if options.step == number:
        break
      continue
    if said["fingerprint"] != base:
      raise CheckpointError(
        f"{folder}: its frozen base has fingerprint {said['fingerprint']}, the one named by this "
        f"config has {base}; give the base it was trained with (config.init)"
      )
    if bad:
      _set_all_aside(checkpoints, folder, bad)
    if not on_disk.checksums(folder / on_disk.PLACE / str(number)):
      _say(f"{folder}: step {number} was saved without checksums; its values are not verified")
    _say(f"continuing {folder} from step {number}")
    place = jax.device_put(fresh.step + number, fresh.step.sharding)
    return fresh.replace(step=place, trainable=trainable, opt_state=opt_state)
  if bad:
    raise CheckpointError(f"{folder}: {on_disk.listed(bad)}. --from-step 0 trains anew")
  return fresh


def _set_all_aside(checkpoints: manager.Checkpoints, folder: Path, bad: Mapping[int, str]) -> None:
  def move() -> None:
    for number, why in sorted(bad.items()):
      _set_aside(folder, number, why)

  processes.collective("steps are set aside", move, only=0)
  checkpoints.reload()


def _say(line: str) -> None:
  if jax.process_index() == 0:
    stream = sys.stderr if "WARNING" in line else sys.stdout
    print(line, file=stream, flush=True)
