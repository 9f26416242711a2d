"""Checkpoints of a run: trainable parameters, optimizer, config, and whose base and data they fit.

A run folder holds `config.json`, `checkpoints/<step>/{params,optimizer,about,sums}` (Orbax, written
asynchronously, visible only when whole), and what the loop logs. `sums` has the checksum of every
array, so a flipped bit is found when a step is restored; the newest whole step is used then. The
frozen base is not copied; its fingerprint is kept, so that another base is refused instead of
silently used. The place in the data is the number of batches, so any number of processes resumes.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from llava_sp_jax import config as config_lib
from llava_sp_jax import folders
from llava_sp_jax.errors import LlavaSPError

CONFIG_FILE = "config.json"
PLACE = "checkpoints"
SUMS = "sums"  # the item of a checkpoint with the checksum of every array
Result = TypeVar("Result")


class CheckpointError(LlavaSPError, RuntimeError):
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


def sums(tree: Any) -> dict[str, int]:
  """A checksum of each leaf of a tree by its path, as `fingerprint` takes them.

  Reads every value once, where it is: on the devices, sharded or not, in whatever process. One leaf
  after the other: simulated devices stand still when many sums over all of them are under way.
  """
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): int(_checksum(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def compare_sums(found: Mapping[str, int], saved: Mapping[str, int], place: Path) -> None:
  """Raises: CheckpointError that names the leaves whose values are not those that were saved."""
  wrong = sorted(path for path, number in found.items() if saved.get(path) != number)
  if wrong:
    shown = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    raise CheckpointError(
      f"{place}: {len(wrong)} arrays are not what was saved (another checksum): {shown}"
    )


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


def read_config(folder: str | Path) -> config_lib.Config:
  """The config of a run. Raises: CheckpointError when `folder` is not a run folder."""
  path = Path(folder) / CONFIG_FILE
  if not path.is_file():
    raise CheckpointError(
      f"{folder}: not a run folder (no {CONFIG_FILE}); give the --workdir of a training run, or the "
      "folder that llava-sp convert made of a checkpoint of others"
    )
  try:
    return config_lib.from_json(path.read_text())
  except (config_lib.ConfigError, UnicodeDecodeError) as error:
    raise CheckpointError(f"{path}: not the config of a run ({error})") from None


def write_config(folder: Path, config: config_lib.Config) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  temporary = folder / (CONFIG_FILE + ".part")
  with folders.written(folder / CONFIG_FILE):
    temporary.write_text(config_lib.to_json(config))
  temporary.replace(folder / CONFIG_FILE)


# Values that may change when a run goes on: they alter neither its numbers nor its files.
MAY_CHANGE = ("config.train.log_every", "config.train.save_every", "config.train.keep",
              "config.data.threads", "config.data.processes", "config.mesh.", "config.train.sinks",
              "config.train.peak_tflops", "config.train.preflight", "config.train.validate_",
              "config.data.validation_path", "config.evaluate.", "config.train.max_nonfinite",
              "config.train.peer_seconds", "config.train.stall_seconds")  # fmt: skip


def check_folder(folder: Path) -> None:
  """Raises: CheckpointError for a `--workdir` whose files are not those of a training run.

  Other files, such as a launcher's log, may lie in it.
  """
  for place in (folder, *folder.absolute().parents):
    if place.is_symlink() and not place.exists():
      raise CheckpointError(f"--workdir {folder}: {place} is a link that leads nowhere")
    if place.exists() and not place.is_dir():
      raise CheckpointError(f"--workdir {folder}: {place} is a file; name a folder")
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


def trouble(place: Path, items: Sequence[str] = ("params", "about")) -> str:
  """Why the folder of a step is no whole checkpoint, as far as names tell; empty when it is one."""
  if not place.is_dir():
    return "it is no folder"
  if missing := [item for item in items if not (place / item).is_dir()]:
    return f"it has no {', '.join(missing)}"
  if SUMS in _listed(place) and not (place / SUMS).is_dir():
    return f"its {SUMS}, by which its values are verified, are gone"
  try:
    number = about(place).get("step", place.name)
  except CheckpointError as error:
    return str(error)
  if str(number) != place.name:
    return f"it says that it is step {number}"
  bare = [item for item in items if item != "about" and not (place / item / "_METADATA").is_file()]
  return f"{bare[0]} has no _METADATA" if bare else ""


def _listed(place: Path) -> set[str]:
  """What Orbax has noted that it saved in the folder of a step; nothing where there is no note."""
  try:
    return set(json.loads((place / "_CHECKPOINT_METADATA").read_bytes())["item_handlers"])
  except (OSError, ValueError, RecursionError, LookupError, TypeError):
    return set()


def about(place: Path) -> dict[str, Any]:
  """What a checkpoint says of itself. Raises: CheckpointError."""
  return _json(place / "about")


def checksums(place: Path) -> dict[str, dict[str, int]]:
  """The checksums kept in a checkpoint, by item; {} for one of the time before there were any.

  Raises: CheckpointError.
  """
  return _json(place / SUMS) if (place / SUMS).is_dir() else {}


def _json(item: Path) -> dict[str, Any]:
  try:
    values = json.loads((item / "metadata").read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    raise CheckpointError(f"{item} cannot be read ({error})") from None
  if not isinstance(values, dict):
    raise CheckpointError(f"{item} cannot be read (found {values!r:.40})")
  return values


def _numbered(folder: Path) -> dict[int, Path]:
  place = folder.absolute() / PLACE
  found = place.iterdir() if place.is_dir() else ()
  numbered = (p for p in found if p.name.isascii() and p.name.isdigit())
  return {int(p.name): p for p in numbered if p.name == str(int(p.name))}


def steps(folder: Path) -> list[int]:
  """Steps of the whole checkpoints in a run folder."""
  return sorted(step for step, place in _numbered(folder).items() if not trouble(place))


def damaged(folder: Path) -> dict[int, str]:
  """{step: why} of what has the name of a checkpoint and is no whole one."""
  found = {step: trouble(place) for step, place in sorted(_numbered(folder).items())}
  return {step: why for step, why in found.items() if why}


Accept = Callable[[Path, dict[str, Any]], None]


def saved(folder: str | Path, accept: Accept | None = None) -> tuple[Path, dict[str, Any], int]:
  """Where the latest parameters are saved; what the run says of itself; its step.

  `accept(place, about)` raises an error for a checkpoint that it cannot use. The next older one is
  taken then, and a line on stderr says so.

  Raises: CheckpointError when there is no whole checkpoint, with what is wrong with each.
  """
  config = read_config(folder)
  problems = damaged(Path(folder))
  for step in reversed(steps(Path(folder))):
    place = Path(folder).absolute() / PLACE / str(step)
    try:
      said = about(place)
      if accept:
        accept(place, said)
    except CheckpointError as error:
      problems[step] = str(error)
      continue
    if newer := {number: why for number, why in problems.items() if number > step}:
      print(f"llava-sp: WARNING: {folder}: {listed(newer)}; step {step} is used instead",
            file=sys.stderr, flush=True)  # fmt: skip
    return place / "params", said, step
  if problems:
    raise CheckpointError(f"{folder}: no checkpoint can be used: {listed(problems)}")
  raise CheckpointError(f"{folder}: no checkpoint yet (run {config.name!r}); train it first")


def listed(problems: Mapping[int, str]) -> str:
  return "; ".join(f"step {step} cannot be used: {why}" for step, why in sorted(problems.items()))
