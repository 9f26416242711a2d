"""Streams parameters from files into an ordinary Orbax checkpoint, one layer at a time.

A leaf is one array of the parameter tree, which may still be in a file. Leaves are stored as Orbax
stores a `jax.Array`, so any mesh can restore them. With several processes, each one reads and
writes its share of the parts. The checkpoint becomes visible when it is complete. An interrupted
call leaves a temporary folder that Orbax ignores, and the next call starts anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from llava_sp_jax import storage
from llava_sp_jax.convert.leaves import Index, InTensors, Leaf, Leaves
from llava_sp_jax.progress import Progress

STAGED_BYTES = 1 << 25  # written parts that share one commit (each commit costs an fsync)
CHUNK_BYTES = 1 << 23  # the largest chunk of a file: the least that a restore of a slice reads


def write(folder: Path, leaves: Leaves, about: dict[str, Any], progress: Progress) -> None:
  """Writes `folder/checkpoints/0/{params,about}`; every process must call it.

  `leaves` are the parameters by path, `about` is metadata as JSON, and `progress` counts bytes.

  Raises: FormatError when a parameter cannot be read.
  """
  # No leaf is a jax.Array, but Orbax warns when there is no handler for those.
  arrays = ocp.type_handlers.ArrayHandler(array_metadata_store=None)
  registry = ocp.type_handlers.create_type_handler_registry(
    (_Tracked, _Handler()), (jax.Array, arrays)
  )
  handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
  handlers.add(
    "params",
    ocp.args.PyTreeSave,
    ocp.PyTreeCheckpointHandler(
      type_handler_registry=registry,
      use_zarr3=True,
      use_compression=False,
    ),
  )
  handlers.add("about", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
  options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
  tracked = {path: _Tracked(leaf, progress) for path, leaf in leaves.items()}
  with ocp.CheckpointManager(
    storage.absolute(folder) / "checkpoints", handler_registry=handlers, options=options
  ) as manager:
    args = ocp.args.Composite(params=ocp.args.PyTreeSave(tracked), about=ocp.args.JsonSave(about))
    manager.save(0, args=args)


@dataclasses.dataclass(frozen=True, eq=False)
class _Tracked:
  """Holds a leaf and its progress bar; Orbax finds the handler by this class."""

  leaf: Leaf
  progress: Progress

  @property
  def shape(self) -> tuple[int, ...]:
    return self.leaf.shape

  @property
  def dtype(self) -> np.dtype:
    return self.leaf.dtype


def parts(leaf: Leaf) -> Iterator[Index]:
  """Yields the slices of an array that are read and written at once: layers, or all of it."""
  rest = (slice(None),) * (len(leaf.shape) - 1)
  if isinstance(leaf, InTensors) and not leaf.stacked:
    yield (slice(None),) * len(leaf.shape)
  elif "/layers/" in leaf.path:
    for layer in range(leaf.shape[0]):
      yield (slice(layer, layer + 1), *rest)
  else:
    yield (slice(None),) * len(leaf.shape)


def chunk(leaf: Leaf) -> tuple[int, ...]:
  """Returns the shape of the chunks in which an array is stored.

  It is one layer, whose longest even side is halved until a chunk has at most CHUNK_BYTES (8 MiB).
  """
  shape = [1, *leaf.shape[1:]] if "/layers/" in leaf.path else list(leaf.shape)
  while math.prod(shape) * leaf.dtype.itemsize > CHUNK_BYTES:
    even = [n for n in shape if n % 2 == 0]
    if not even:
      break
    shape[shape.index(max(even))] //= 2
  return tuple(shape)


class _Handler(ocp.type_handlers.TypeHandler):  # type: ignore[misc]  # orbax has no types
  """Saves `_Tracked` leaves; Orbax's own handler restores them."""

  def typestr(self) -> str:
    return "jax.Array"

  async def serialize(
    self, values: Sequence[_Tracked], infos: Sequence[Any], args: Any = None
  ) -> list[Any]:
    write = self._write(values, infos)
    return [ocp.future.CommitFutureAwaitingContractedSignals(write, name="leaves")]

  async def _write(self, values: Sequence[_Tracked], infos: Sequence[Any]) -> None:
    process, processes, turn = jax.process_index(), jax.process_count(), 0
    staged, waiting = ts.Transaction(), 0
    pending: Any = None  # the previous commit, which runs while the next parts are read
    for tracked, info in zip(values, infos, strict=True):
      leaf = tracked.leaf
      await info.await_path_creation()
      spec = ts.Spec(
        ocp.type_handlers.get_json_tspec_write(
          info,
          use_ocdbt=True,
          global_shape=leaf.shape,
          local_shape=chunk(leaf),
          dtype=leaf.dtype,
          process_index=process,
        )
      )
      for index in parts(leaf):
        turn += 1
        if turn % processes != process:
          continue
        store = await ts.open(
          spec, open=True, assume_metadata=True, context=info.ts_context, transaction=staged
        )
        values_ = leaf.read(index)
        await store[index].write(values_, can_reference_source_data_indefinitely=True)
        tracked.progress.add(values_.nbytes * processes)
        waiting += values_.nbytes
        if waiting >= STAGED_BYTES:
          if pending:
            await pending
          pending = staged.commit_async()
          staged, waiting = ts.Transaction(), 0
        del values_
      if process == 0:
        await ts.open(spec, create=True, open=True, context=info.ts_context, transaction=staged)
    if pending:
      await pending
    await staged.commit_async()

  async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
    raise NotImplementedError("restore with Orbax's own handler")

  async def deserialize(self, infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
    raise NotImplementedError("restore with Orbax's own handler")


class SavedItem:
  """Reads the parameters that a checkpoint has saved in `folder`.

  Keeps the array that was read last, because its next slice is often asked for next. Values in a
  bucket are read from a local copy, which the first array that is read makes.
  """

  def __init__(self, folder: Path):
    self._folder = folder
    self._last: dict[str, np.ndarray] = {}

  @functools.cached_property
  def _local(self) -> Path:
    return storage.of(self._folder).local(self._folder)

  def leaves(self) -> Leaves:
    """Returns the saved parameters by path, as leaves whose values are not read."""
    saved = ocp.PyTreeCheckpointHandler().metadata(self._folder)
    return {p: Stored(p, tuple(m.shape), np.dtype(m.dtype), self) for p, m in saved.items()}

  def read(self, path: str) -> np.ndarray:
    """Returns all values of the parameter at `path`."""
    if path not in self._last:
      self._last.clear()
      with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as checkpointer:
        # Restored as numpy, because the devices that it was saved from may be absent.
        wanted = {path: ocp.RestoreArgs(restore_type=np.ndarray)}
        args = ocp.args.PyTreeRestore({path: 0}, restore_args=wanted, partial_restore=True)
        self._last[path] = checkpointer.restore(self._local, args=args)[path]
    return self._last[path]


@dataclasses.dataclass(frozen=True)
class Stored(Leaf):
  """Reads a parameter from a checkpoint of this package."""

  item: SavedItem

  def read(self, index: Index | None = None) -> np.ndarray:
    values = self.item.read(self.path)
    return values if index is None else values[index]
