"""Saves and restores the steps of a run: trainable parameters, optimizer state, and metadata.

A run folder holds `config.json`, `checkpoints/<step>/{params,optimizer,about,sums}` (Orbax, written
asynchronously, visible only when complete), and the logs of the loop. `sums` holds the checksum of
every array, so a restore detects a flipped bit. The frozen base is not copied. Its fingerprint is
kept, so that a run with another base is refused. The position in the data is the number of batches,
so a run may resume with another number of processes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from llava_sp_jax import console, storage
from llava_sp_jax.checkpoints.fingerprints import compare_sums, sums
from llava_sp_jax.checkpoints.on_disk import PLACE, checksums, trouble
from llava_sp_jax.distributed import notices, processes
from llava_sp_jax.errors import CheckpointError

Result = TypeVar("Result")


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
  """Manages the checkpoints of one run folder; leaving its block waits for pending writes.

  The checksum of every parameter and moment is saved with each step. Computing them takes one pass
  over the arrays on the devices at each save and each restore, and reads no file twice.
  """

  def __init__(self, folder: str | Path, keep: int = 2):
    """Opens the checkpoints of the run folder `folder`; `keep` is how many of the newest are kept.

    Raises: CheckpointError when `checkpoints` in it exists and is not a folder.
    """
    self.folder = storage.absolute(storage.place(folder))
    place = self.folder / PLACE
    if os.path.islink(place) and not place.exists():
      raise CheckpointError(f"--workdir {folder}: {place} is a link that leads nowhere")
    if place.exists() and not place.is_dir():
      raise CheckpointError(
        f"{place}: expected a folder of checkpoints, found a file; move it away"
      )
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      enable_async_checkpointing=True,
      async_options=ocp.options.AsyncOptions(barrier_sync_fn=self._meet),
    )
    self._thread = threading.get_ident()
    self._manager, self._closed = ocp.CheckpointManager(place, options=options), False

  def _meet(self, *, key: str, timeout_ms: int) -> None:
    """Waits for the other processes at a barrier of Orbax.

    Threads of Orbax come here after their write has failed, too, with its error on its way. The
    others would wait for this process until the limit of 20 minutes, so the run is aborted.
    """
    failed = sys.exception() if self._thread != threading.get_ident() else None
    if failed and jax.process_count() > 1:
      problem = _described(f"{self.folder}: a step could not be saved", failed)
      notices.abort(f"CheckpointError: {console.error_line(problem)}", 1)
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

  @property
  def latest(self) -> int | None:
    """Returns the newest step that Orbax lists; None if there is none."""
    result: int | None = self._manager.latest_step()
    return result

  def preempted(self, step: int) -> bool:
    """Returns whether the cluster has announced to stop this job, so that `step` must be the last.

    It is False where JAX's distributed service does not run, as in most runs of a single process.
    """
    return jax.distributed.is_initialized() and self._manager.reached_preemption(step)

  def save(self, step: int, params: Any, opt_state: Any, about: Mapping[str, Any]) -> None:
    """Starts to write the checkpoint of `step`; every process must call it.

    `about` is metadata that can be written as JSON. Older steps are removed only when this one is
    complete. Does nothing if the newest checkpoint is that of `step`.

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
    what = f"{self.folder}: step {step} or the one before it could not be saved"
    if not as_checkpoint_error(what, lambda: self._manager.save(step, args=args)):
      raise CheckpointError(
        f"{self.folder}: step {step} was not saved, as step {self.latest} is there"
      )

  def restore(
    self, params: Any, opt_state: Any, step: int | None = None
  ) -> tuple[int, Any, Any, Any]:
    """Returns (step, params, opt_state, about) of `step`; None is the latest.

    Every process must call it. `params` and `opt_state` are arrays or ShapeDtypeStructs with the
    shardings to restore to. The values are compared with their checksums when all processes have read
    theirs.

    Raises: CheckpointError when the step cannot be read here, or differs from what was saved; PeerError
      when another process cannot read it.
    """
    step = self.latest if step is None else step
    if step is None:
      raise CheckpointError(f"{self.folder}: no checkpoint to restore")
    place = self.folder / PLACE / str(step)
    found = processes.collective(
      f"step {step} is read", lambda: self._read(place, {"params": params, "optimizer": opt_state})
    )
    assert found is not None
    known, about, restored = found
    for item, tree in restored.items() if known else ():
      compare_sums(sums(tree), known.get(item, {}), place / item)
    return step, restored["params"], restored["optimizer"], about

  def _read(
    self, place: Path, trees: Mapping[str, Any]
  ) -> tuple[dict[str, dict[str, int]], Any, dict[str, Any]]:
    """Returns the checksums, the metadata and the arrays of a step; waits for no other process.

    Orbax's manager would: where one process cannot read, the others would wait for it at a barrier.
    """
    if problem := trouble(place, (*trees, "about")):
      raise CheckpointError(f"{place}: {problem}")

    def read() -> tuple[Any, dict[str, Any]]:
      arrays = {}
      for item, tree in trees.items():
        args = ocp.args.StandardRestore(jax.tree.map(_abstract, tree))
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
          arrays[item] = handler.restore(epath.Path(place / item), args=args)
      return ocp.JsonCheckpointHandler().restore(epath.Path(place / "about")), arrays

    about, arrays = as_checkpoint_error(f"{place}: cannot be read", read)
    return checksums(place), about, arrays

  def reload(self) -> None:
    """Reads the list of steps again, after steps were moved."""
    self._manager.reload()

  def close(self) -> None:
    """Waits for pending writes; a second call does nothing.

    Raises: CheckpointError when they fail.
    """
    if self._closed:
      return
    self._closed = True
    as_checkpoint_error(
      f"{self.folder}: the last checkpoint could not be saved", self._manager.close
    )

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
    if error is None:
      self.close()
      return
    if isinstance(error, CheckpointError) and jax.process_count() > 1:
      return  # others may be waiting for the write that has failed here
    try:  # complete a pending write although the step has failed
      self.close()
    except CheckpointError as another:
      print(f"llava-sp: {another}", file=sys.stderr, flush=True)


def as_checkpoint_error(what: str, work: Callable[[], Result]) -> Result:
  """Calls `work`, and turns an error of any library into a CheckpointError of one line.

  The message begins with `what`, which says what failed. The traceback becomes a note of that
  error. The error itself is dropped and its garbage is collected quietly here: Orbax would
  otherwise print the failure of its unfinished reads again. An error of missing memory is raised as
  it is.
  """
  try:
    return work()
  except (MemoryError, CheckpointError):
    raise
  except Exception as error:
    if "RESOURCE_EXHAUSTED" in str(error) and not _full(str(error)):
      raise
    problem = _described(what, error)
  before, sys.unraisablehook = sys.unraisablehook, lambda _: None
  try:
    gc.collect()
  finally:
    sys.unraisablehook = before
  raise problem


def _described(what: str, error: BaseException) -> CheckpointError:
  text = str(error)
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  hint = "; free some space and give the same command again" if _full(text) else ""
  problem = CheckpointError(f"{what} ({(lines or [type(error).__name__])[0][:300]}){hint}")
  problem.add_note("".join(traceback.format_exception(error)))
  return problem


def _full(text: str) -> bool:
  return "No space left" in text or "quota" in text.lower()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
