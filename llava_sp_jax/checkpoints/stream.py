"""Writes leaves that are still in files into an ordinary Orbax checkpoint, a layer at a time.

On disk they are what Orbax writes for a `jax.Array`, so any mesh restores them. With several
processes each reads and writes its share of the parts only. The checkpoint appears when it is
whole; an interrupted one leaves a temporary folder that Orbax ignores, and starts anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from llava_sp_jax.convert.leaves import Index, InTensors, Leaf, Leaves
from llava_sp_jax.progress import Progress

STAGED_BYTES = 1 << 25  # written parts that wait for one commit (each costs an fsync)
CHUNK_BYTES = 1 << 23  # of the file's grid: what a device that restores a slice must read at least


def write(folder: Path, leaves: Leaves, about: dict[str, Any], progress: Progress) -> None:
  """`folder/checkpoints/0/{params,about}`; call it in every process. Raises: FormatError."""
  # None of them is a jax.Array; without a handler for those, Orbax warns.
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
    folder.absolute() / "checkpoints", handler_registry=handlers, options=options
  ) as manager:
    args = ocp.args.Composite(params=ocp.args.PyTreeSave(tracked), about=ocp.args.JsonSave(about))
    manager.save(0, args=args)


@dataclasses.dataclass(frozen=True, eq=False)
class _Tracked:
  """A leaf with its progress; the class is what Orbax finds the handler by."""

  leaf: Leaf
  progress: Progress

  @property
  def shape(self) -> tuple[int, ...]:
    return self.leaf.shape

  @property
  def dtype(self) -> np.dtype:
    return self.leaf.dtype


def parts(leaf: Leaf) -> Iterator[Index]:
  """What is read and written at once: a layer of a stack, otherwise the leaf."""
  rest = (slice(None),) * (len(leaf.shape) - 1)
  if isinstance(leaf, InTensors) and not leaf.stacked:
    yield (slice(None),) * len(leaf.shape)
  elif "/layers/" in leaf.path:
    for layer in range(leaf.shape[0]):
      yield (slice(layer, layer + 1), *rest)
  else:
    yield (slice(None),) * len(leaf.shape)


def chunk(leaf: Leaf) -> tuple[int, ...]:
  """The file's grid: a layer, its longest even side halved until it is small."""
  shape = [1, *leaf.shape[1:]] if "/layers/" in leaf.path else list(leaf.shape)
  while math.prod(shape) * leaf.dtype.itemsize > CHUNK_BYTES:
    even = [n for n in shape if n % 2 == 0]
    if not even:
      break
    shape[shape.index(max(even))] //= 2
  return tuple(shape)


class _Handler(ocp.type_handlers.TypeHandler):
  """Saves `_Tracked` leaves; restoring is Orbax's own."""

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
    pending: Any = None  # the commit before, which goes on while the next parts are read
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
  """A saved `params` item; the leaf that was read last is kept, for the next slice of it."""

  def __init__(self, folder: Path):
    self._folder = folder
    self._last: dict[str, np.ndarray] = {}

  def leaves(self) -> Leaves:
    """Its leaves, not yet read."""
    saved = ocp.PyTreeCheckpointHandler().metadata(self._folder)
    return {p: Stored(p, tuple(m.shape), np.dtype(m.dtype), self) for p, m in saved.items()}

  def read(self, path: str) -> np.ndarray:
    if path not in self._last:
      self._last.clear()
      with contextlib.closing(ocp.Checkpointer(ocp.PyTreeCheckpointHandler())) as checkpointer:
        # As numpy, whatever devices it was saved from; those need not be here.
        wanted = {path: ocp.RestoreArgs(restore_type=np.ndarray)}
        args = ocp.args.PyTreeRestore({path: 0}, restore_args=wanted, partial_restore=True)
        self._last[path] = checkpointer.restore(self._folder, args=args)[path]
    return self._last[path]


@dataclasses.dataclass(frozen=True)
class Stored(Leaf):
  """A leaf in a checkpoint of ours."""

  item: SavedItem

  def read(self, index: Index | None = None) -> np.ndarray:
    values = self.item.read(self.path)
    return values if index is None else values[index]
