"""Checkpoints of a run: what learns, optimizer, data position, config, and whose base it fits.

A run folder holds `config.json`, `checkpoints/<step>/{params,optimizer,about}` (Orbax, written
asynchronously, visible only when whole), and what the loop logs. The frozen base is not copied; its
fingerprint is kept, so that another base is refused instead of silently used. The place in the data
is the number of batches, so any number of processes goes on from it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from llava_sp_jax import config as config_lib

CONFIG_FILE = "config.json"


class CheckpointError(RuntimeError):
  """A run folder that cannot be used; the message says what was found and what to do."""


def fingerprint(tree: Mapping[str, Any]) -> str:
  """A short hash of a flat `{path: array}` tree: names, shapes, dtypes and every bit of the values.

  The sum is over integers, so it does not depend on how arrays are sharded.
  """
  digest = hashlib.sha256()
  for path in sorted(tree):
    leaf = tree[path]
    digest.update(f"{path} {leaf.shape} {leaf.dtype} {int(_checksum(leaf))}\n".encode())
  return digest.hexdigest()[:16]


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
  weight = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(x.shape):  # a weight for each place, so that order matters
    steps = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    weight = weight * jnp.uint32(size) + steps
  return jnp.sum(bits * (weight * jnp.uint32(2654435761) | jnp.uint32(1)), dtype=jnp.uint32)


class Checkpoints:
  """The checkpoints of one run folder."""

  def __init__(self, folder: str | Path, keep: int = 2):
    self.folder = Path(folder).absolute()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
    self._manager = ocp.CheckpointManager(self.folder / "checkpoints", options=options)

  @property
  def latest(self) -> int | None:
    return self._manager.latest_step()

  def preempted(self, step: int) -> bool:
    """Whether the cluster announced that this job will be stopped (several processes only)."""
    return jax.distributed.is_initialized() and self._manager.reached_preemption(step)

  def save(self, step: int, params: Any, opt_state: Any, about: Any) -> None:
    """Starts writing; earlier steps stay until this one is whole. Call it in every process."""
    if step == self.latest:
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        optimizer=ocp.args.StandardSave(opt_state),
        about=ocp.args.JsonSave(about),
      ),
    )

  def restore(self, params: Any, opt_state: Any) -> tuple[int, Any, Any, Any]:
    """step, params, opt_state, about of the latest step.

    The arguments are arrays or ShapeDtypeStructs with the shardings to restore to.
    """
    step = self.latest
    if step is None:
      raise CheckpointError(f"{self.folder}: no checkpoint to restore")
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardRestore(jax.tree.map(_abstract, params)),
        optimizer=ocp.args.StandardRestore(jax.tree.map(_abstract, opt_state)),
        about=ocp.args.JsonRestore(),
      ),
    )
    return step, restored["params"], restored["optimizer"], restored["about"]

  def close(self) -> None:
    """Waits until all is written."""
    self._manager.close()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def read_config(folder: str | Path) -> config_lib.Config:
  """The config of a run. Raises: CheckpointError when `folder` is not a run folder."""
  path = Path(folder) / CONFIG_FILE
  if not path.is_file():
    raise CheckpointError(
      f"{folder}: not a run folder (no {CONFIG_FILE}); give the --workdir of a training run"
    )
  return config_lib.from_json(path.read_text())


def write_config(folder: Path, config: config_lib.Config) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  temporary = folder / (CONFIG_FILE + ".part")
  temporary.write_text(config_lib.to_json(config))
  temporary.replace(folder / CONFIG_FILE)


# Values that may change when a run goes on: they alter neither its numbers nor its files.
MAY_CHANGE = ("config.train.log_every", "config.train.save_every", "config.train.keep",
              "config.data.threads", "config.data.processes", "config.mesh.", "config.train.sinks",
              "config.train.peak_tflops", "config.train.preflight", "config.train.validate_",
              "config.data.validation_path", "config.evaluate.", "config.train.max_nonfinite",
              "config.train.peer_seconds", "config.train.stall_seconds")  # fmt: skip


def check_config(folder: Path, config: config_lib.Config) -> None:
  """Raises: CheckpointError that shows both values where `config` contradicts the run's."""
  if not (folder / CONFIG_FILE).is_file() or not steps(folder):
    return  # nothing was trained yet, so there is nothing to contradict
  lines = config_lib.differences(config, read_config(folder))
  lines = [line for line in lines if not line.startswith(MAY_CHANGE)]
  if lines:
    raise CheckpointError(
      f"{folder} was started with another config ('here' is yours, 'there' is the run's):\n  "
      + "\n  ".join(lines)
      + "\nGive the run's values to continue it, or another --workdir."
    )


def steps(folder: Path) -> list[int]:
  """Steps of the whole checkpoints in a run folder."""
  place = folder.absolute() / "checkpoints"
  return sorted(ocp.utils.checkpoint_steps(place)) if place.is_dir() else []


def saved(folder: str | Path) -> tuple[Path, dict[str, Any], int]:
  """Where the latest parameters are saved; what the run says of itself; its step.

  Raises: CheckpointError when there is no whole checkpoint.
  """
  config = read_config(folder)
  found = steps(Path(folder))
  if not found:
    raise CheckpointError(f"{folder}: no checkpoint yet (run {config.name!r}); train it first")
  place = Path(folder).absolute() / "checkpoints" / str(found[-1])
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
    about = checkpointer.restore(place / "about")
  return place / "params", about, found[-1]


def drop_lines_after(path: Path, step: int) -> None:
  """Forgets logged steps that a resumed run is about to do again."""
  if not path.is_file():
    return
  lines = []
  for line in path.read_text().splitlines():
    try:
      if json.loads(line)["step"] <= step:
        lines.append(line)
    except (json.JSONDecodeError, KeyError):
      continue  # a line cut off by the kill
  temporary = path.with_name(path.name + ".part")
  temporary.write_text("".join(f"{line}\n" for line in lines))
  temporary.replace(path)
