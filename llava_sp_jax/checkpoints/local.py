"""Keeps the newest steps of a run on the disk of each host, beside the checkpoints in its run folder.

A process writes the parts of the arrays that its own devices hold to `FOLDER/RUN/process-I/`, in a
thread, and waits for no other process: `STEP.safetensors`, then `STEP.json`, without which a step
counts as nothing. The same number of processes with the same mesh may read it again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from llava_sp_jax import json_files, storage
from llava_sp_jax.checkpoints import fingerprints
from llava_sp_jax.convert import safetensors_file
from llava_sp_jax.errors import CheckpointError
from llava_sp_jax.files import FormatError

KEEP = 2  # steps: a host that dies while it writes the newest one has the one before, as all have
ARRAYS, ABOUT = ".safetensors", ".json"


class Local:
  """Writes and reads the part that this process has of the newest steps of a run.

  As a context, it waits at its end for the write in progress, so that who trains on in the same
  process finds it whole.
  """

  def __init__(self, folder: str | Path, run: str, start: str):
    """Opens the steps below `folder`; `run` names the run, and `start` this start of it.

    Parts that different starts have written make no step: their bits need not be of one training.
    """
    self.run, self._start = run, start
    self.place = Path(folder).absolute() / run / f"process-{jax.process_index()}"
    self._thread: threading.Thread | None = None
    self._failed = False

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.wait()

  def held(self) -> dict[int, dict[str, Any]]:
    """Returns {step: what its file says of it} of the whole parts that are here."""
    mine = jax.process_count()
    return {step: said for step, said in self._whole().items() if said["processes"] == mine}

  def of_others(self) -> dict[int, int]:
    """Returns {step: processes} of the parts here that another number of processes has written."""
    mine = jax.process_count()
    found = {step: int(said["processes"]) for step, said in self._whole().items()}
    return {step: count for step, count in found.items() if count != mine}

  def _whole(self) -> dict[int, dict[str, Any]]:
    found = {}
    for file in self.place.glob(f"*{ABOUT}"):
      with contextlib.suppress(FormatError, OSError, ValueError, TypeError, KeyError):
        said = json_files.read_object(file)
        if said["step"] == int(file.stem) and int(said["processes"]):
          found[int(file.stem)] = said
    return found

  def save(
    self, step: int, params: Any, opt_state: Any, about: Mapping[str, Any], kept: bool = True
  ) -> None:
    """Copies the parts of this process to the host, and starts to write them, if they are `kept`.

    Every process must call it, because the checksums are of whole arrays. Waits for the write of
    the step before. A disk that takes no more data is reported, and training continues.
    """
    trees = {"params": params, "optimizer": opt_state}
    said = {
      **about,
      "step": step,
      "start": self._start,
      "processes": jax.process_count(),
      "sums": {item: fingerprints.sums(tree) for item, tree in trees.items()},
    }
    if not kept:
      return
    self.wait()
    shards = {
      _name(item, path, shard.index, leaf.shape): shard.data
      for item, path, leaf in _leaves(trees)
      for shard in leaf.addressable_shards
    }
    for shard in shards.values():
      shard.copy_to_host_async()
    parts = {name: np.array(shard) for name, shard in shards.items()}  # the next step donates them
    self._thread = threading.Thread(target=self._write, args=(step, parts, said), name="local")
    self._thread.start()

  def _write(self, step: int, parts: dict[str, np.ndarray], said: dict[str, Any]) -> None:
    import safetensors.numpy

    part = self.place / f"{step}.part"
    try:
      self.place.mkdir(parents=True, exist_ok=True)
      safetensors.numpy.save_file(parts, part)
      with part.open("rb") as file:
        os.fsync(file.fileno())
      part.replace(self._file(step, ARRAYS))
      storage.DISK.put(self._file(step, ABOUT), json.dumps(said).encode())
      self.drop(set(sorted(self.held())[-KEEP:]))
      self._failed = False
    except Exception as error:  # an OSError, or safetensors' own
      if not self._failed:
        print(
          f"llava-sp: WARNING: {self.place}: step {step} could not be kept ({error}); the run goes "
          "on, with the checkpoints in its folder",
          file=sys.stderr,
          flush=True,
        )
      self._failed = True
      with contextlib.suppress(OSError):
        part.unlink(missing_ok=True)

  def _file(self, step: int, ending: str) -> Path:
    return self.place / f"{step}{ending}"

  def read(self, step: int, params: Any, opt_state: Any) -> tuple[Any, Any]:
    """Returns (params, opt_state) of `step`, of which each process reads its own parts.

    The arguments are arrays with the shardings to restore to. `verify` compares the values.

    Raises: CheckpointError when the parts are not those that the devices of this process need.
    """
    file = self._file(step, ARRAYS)
    try:
      stored = safetensors_file.open_safetensors(file)
    except (FormatError, OSError) as error:
      raise CheckpointError(f"{file}: {error}") from None

    def whole(item: str, tree: Any) -> Any:
      return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _array(file, stored, item, path, leaf), tree
      )

    return whole("params", params), whole("optimizer", opt_state)

  def verify(self, step: int, params: Any, opt_state: Any) -> None:
    """Compares the values of `step` with their checksums; every process must call it.

    Raises: CheckpointError in all processes when any value differs.
    """
    known = json_files.read_object(self._file(step, ABOUT))["sums"]
    for item, tree in (("params", params), ("optimizer", opt_state)):
      fingerprints.compare_sums(fingerprints.sums(tree), known[item], self._file(step, ARRAYS))

  def drop(self, keep: set[int]) -> None:
    """Removes all steps that are here but those of `keep`."""
    for file in sorted(self.place.glob("*")):  # what says that a step is whole, first
      if file.suffix in (ARRAYS, ABOUT, ".part") and file.stem not in set(map(str, keep)):
        with contextlib.suppress(OSError):
          file.unlink()

  def wait(self) -> None:
    """Waits for the write in progress."""
    if self._thread:
      self._thread.join()
      self._thread = None

  def remove(self) -> None:
    """Removes what this process has kept of the run; the last checkpoint is in the run folder."""
    self.wait()
    shutil.rmtree(self.place, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process of this host has its own beside it
      self.place.parent.rmdir()


def _leaves(trees: Mapping[str, Any]) -> Iterator[tuple[str, Any, jax.Array]]:
  for item, tree in trees.items():
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
      yield item, path, leaf


def _name(item: str, path: Any, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
  """Returns the name of the part of an array that `index` selects: "params/a/b [0:4,8:16]"."""
  spans = (s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
  where = ",".join(f"{first}:{last}" for first, last in spans)
  return f"{item}/{jax.tree_util.keystr(path, simple=True, separator='.')} [{where}]"


def _array(file: Path, stored: Mapping[str, Any], item: str, path: Any, like: Any) -> jax.Array:
  """Puts the parts of an array on the devices of this process."""
  parts = []
  for device, index in like.sharding.addressable_devices_indices_map(like.shape).items():
    name = _name(item, path, index, like.shape)
    if name not in stored or stored[name].dtype != like.dtype:
      raise CheckpointError(f"{file}: has no {name} in {like.dtype}; it is of another mesh")
    parts.append(jax.device_put(stored[name].array(), device, may_alias=False))
  return jax.make_array_from_single_device_arrays(like.shape, like.sharding, parts)
