"""Saves and restores the steps of a run: trainable parameters, optimizer, and what belongs to them.

A run folder holds `config.json`, `checkpoints/<step>/{params,optimizer,about,sums}` (Orbax, written
asynchronously, visible only when whole), and what the loop logs. `sums` has the checksum of every
array, so a flipped bit is found when a step is restored; the newest whole step is used then. The
frozen base is not copied; its fingerprint is kept, so that another base is refused instead of
silently used. The place in the data is the number of batches, so any number of processes resumes.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from llava_sp_jax.checkpoints.fingerprints import compare_sums, sums
from llava_sp_jax.checkpoints.on_disk import PLACE, checksums, trouble
from llava_sp_jax.errors import CheckpointError

Result = TypeVar("Result")


class Checkpoints(contextlib.AbstractContextManager):
  """The checkpoints of one run folder; leaving the block waits until all is written.

  With each step the checksum of every parameter and moment is kept. It costs one pass over them on
  the devices when they are saved and one when they are restored; no file is read twice.
  """

  def __init__(self, folder: str | Path, keep: int = 2):
    """Raises: CheckpointError when something else has the name of their folder."""
    self.folder = Path(folder).absolute()
    place = self.folder / PLACE
    if place.is_symlink() and not place.exists():
      raise CheckpointError(f"--workdir {folder}: {place} is a link that leads nowhere")
    if place.exists() and not place.is_dir():
      raise CheckpointError(
        f"{place}: expected a folder of checkpoints, found a file; move it away"
      )
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self._manager, self._closed = ocp.CheckpointManager(place, options=options), False

  @property
  def latest(self) -> int | None:
    return self._manager.latest_step()

  def preempted(self, step: int) -> bool:
    """Whether the cluster announced that this job will be stopped (several processes only)."""
    return jax.distributed.is_initialized() and self._manager.reached_preemption(step)

  def save(self, step: int, params: Any, opt_state: Any, about: Mapping[str, Any]) -> None:
    """Starts writing; earlier steps stay until this one is whole. Call it in every process.

    Raises: CheckpointError when this step, or the one before, cannot be written.
    """
    if step == self.latest:
      return
    checksums = {"params": sums(params), "optimizer": sums(opt_state)}
    args = ocp.args.Composite(
      params=ocp.args.StandardSave(params),
      optimizer=ocp.args.StandardSave(opt_state),
      about=ocp.args.JsonSave({**about, "step": step}),
      sums=ocp.args.JsonSave(checksums),
    )
    told(
      f"{self.folder}: step {step} or the one before it could not be saved",
      lambda: self._manager.save(step, args=args),
    )

  def restore(
    self, params: Any, opt_state: Any, step: int | None = None
  ) -> tuple[int, Any, Any, Any]:
    """step, params, opt_state, about of `step`, or of the latest; values are verified.

    The arguments are arrays or ShapeDtypeStructs with the shardings to restore to.

    Raises: CheckpointError when the step cannot be read, or is not what was saved.
    """
    step = self.latest if step is None else step
    if step is None:
      raise CheckpointError(f"{self.folder}: no checkpoint to restore")
    place = self.folder / PLACE / str(step)
    if problem := trouble(place, ("params", "optimizer", "about")):
      raise CheckpointError(f"{place}: {problem}")
    args = ocp.args.Composite(
      params=ocp.args.StandardRestore(jax.tree.map(_abstract, params)),
      optimizer=ocp.args.StandardRestore(jax.tree.map(_abstract, opt_state)),
      about=ocp.args.JsonRestore(),
    )
    restored = told(f"{place}: cannot be read", lambda: self._manager.restore(step, args=args))
    known = checksums(place)
    for item in ("params", "optimizer") if known else ():
      compare_sums(sums(restored[item]), known.get(item, {}), place / item)
    return step, restored["params"], restored["optimizer"], restored["about"]

  def reload(self) -> None:
    """Looks at the folder again, after steps were moved."""
    self._manager.reload()

  def close(self) -> None:
    """Waits until all is written; once. Raises: CheckpointError when it cannot be."""
    if self._closed:
      return
    self._closed = True
    told(f"{self.folder}: the last checkpoint could not be saved", self._manager.close)

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
    if error is None:
      self.close()
      return
    try:  # what is being written gets whole, also when a step has failed
      self.close()
    except CheckpointError as another:
      print(f"llava-sp: {another}", file=sys.stderr, flush=True)


def told(what: str, work: Callable[[], Result]) -> Result:
  """What `work` returns. Whatever library fails in it, that is a CheckpointError of one line.

  Its traceback is kept as a note, and not the error itself: what Orbax had begun to read would be
  told again, at length, when it is thrown away. To have no memory is another matter and is raised.
  """
  try:
    return work()
  except (MemoryError, CheckpointError):
    raise
  except Exception as error:
    text = str(error)
    full = "No space left" in text or "quota" in text.lower()
    if "RESOURCE_EXHAUSTED" in text and not full:
      raise
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    hint = "; free some space and give the same command again" if full else ""
    problem = CheckpointError(f"{what} ({(lines or [type(error).__name__])[0][:300]}){hint}")
    problem.add_note("".join(traceback.format_exception(error)))
  before, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    gc.collect()
  finally:
    sys.unraisablehook = before
  raise problem


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
