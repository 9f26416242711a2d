"""Writes the compiled step to a file, and reads it where it fits: nothing is traced or compiled then.

An executable is a program for certain chips and runs as it is, like a recipe: read only your own.
`FILE.json` beside it says what it was compiled from and for. It is compared before the file is read.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from llava_sp_jax import config as config_lib
from llava_sp_jax import files, folders, json_files
from llava_sp_jax.data.failure import reason
from llava_sp_jax.distributed import processes
from llava_sp_jax.training import peers
from llava_sp_jax.training.programs import Shapes, shapes

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")  # whose versions are compared
ROOMS = ("batch.py", "config.py", "distributed", "models", "training")  # that the step is made of
# Keys of `data` that the compiled step does not depend on; it does not depend on `init` either.
ANY_DATA = ("source", "path", "image_folder", "tokenizer", "template", "validation_fraction")


def about(config: config_lib.Config, device_mesh: Mesh) -> dict[str, Any]:
  """Returns what the compiled step depends on, besides shapes: `{name: value}` for a JSON file.

  `config` is one value, under "config". `device_mesh` has the devices, which may be absent.
  """
  devices = list(device_mesh.devices.flat)
  places = [(d.id, list(getattr(d, "coords", ()))) for d in devices]
  found = {name: _version(name) for name in PACKAGES}
  return {
    **found,
    "compiler": devices[0].client.platform_version.splitlines()[-1],
    "devices": f"{len(devices)} x {devices[0].device_kind}",
    "order of devices": _digest(places),
    "mesh": " x ".join(f"{axis} {size}" for axis, size in device_mesh.shape.items()),
    "mesh.base": config.mesh.base,
    "code": _digest([peers.of_folder(Path(__file__).parents[1] / room, "*.py") for room in ROOMS]),
    "config": config_lib.to_dict(config),
  }


def _digest(values: Any) -> str:
  return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def _version(name: str) -> str:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return "not installed"


def write(
  path: Path,
  compiled: Any,
  batch: Mapping[str, Any],
  config: config_lib.Config,
  device_mesh: Mesh,
) -> None:
  """Writes the compiled step to `path`, and what it depends on to `path`.json.

  Args:
    path: the file, which is replaced when it exists.
    compiled: what `lower(state, batch, rng).compile()` returned.
    batch: the arrays of its batches, or their shapes, by name.
    config: the config that it was compiled from.
    device_mesh: the mesh that it was compiled for.
  """
  content, taken, out = serialize_executable.serialize(compiled)
  _, metrics = jax.tree.unflatten(out, range(out.num_leaves))
  said = {
    **about(config, device_mesh),
    "batch": {name: list(shape) for name, shape in shapes(batch)},
    "metrics": sorted(metrics),
    "arguments": taken.num_leaves,
    "results": out.num_leaves,
    "sha256": hashlib.sha256(content).hexdigest(),
  }
  part = path.with_name(path.name + folders.PART)
  with folders.written(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    _beside(path).unlink(missing_ok=True)  # so that it never stands beside another executable
    part.write_bytes(content)
    part.replace(path)
    _beside(path).write_text(json.dumps(said, indent=1) + "\n")


def check(path: Path, config: config_lib.Config, device_mesh: Mesh, steps: bool = True) -> None:
  """Compares what an executable was compiled from and for with this run; reads only `path`.json.

  `steps` is whether the steps of `config` are known; with `train.epochs` they follow from the data.

  Raises:
    FormatError: for a file that cannot be read.
    ConfigError: with every difference.
  """
  theirs, ours = json_files.read_object(_beside(path)), about(config, device_mesh)
  lines = [
    f"{name}: {ours[name]} here, {theirs.get(name, 'unknown')} there"
    for name in ours
    if name != "config" and theirs.get(name) != ours[name]
  ]
  try:
    lines += config_lib.differences(
      config, _for_run(theirs.get("config"), config, steps), but_free=True
    )
  except config_lib.ConfigError as error:
    lines.append(f"config: {error}")
  if lines:
    raise config_lib.ConfigError(
      f"--executable {path}: was compiled for another run ('here' is this run, 'there' the file):"
      "\n  " + "\n  ".join(lines) + "\nWrite it anew (llava-sp plan --write-executable), or leave "
      "the option out: the step is compiled then"
    )


def _for_run(values: Any, config: config_lib.Config, steps: bool) -> config_lib.Config:
  """Returns the config in `values`, with those of `config` where the step does not depend on it."""
  made = config_lib.from_dict(values)
  same = {name: getattr(config.data, name) for name in ANY_DATA}
  return dataclasses.replace(
    made,
    name=config.name,
    init=config.init,
    data=dataclasses.replace(made.data, **same),
    train=dataclasses.replace(
      made.train,
      seed=config.train.seed,
      steps=made.train.steps if steps else config.train.steps,
    ),
  )


class Loading:
  """Loads an executable in a thread, while the run reads its data, its parameters and its step.

  The end of the process waits for the thread, which reads no file.
  """

  def __init__(self, path: Path):
    """Reads a file that `check` has accepted, and begins to load it.

    Raises: FormatError for a file that is damaged.
    """
    said = json_files.read_object(_beside(path))
    content = path.read_bytes() if files.is_regular(path) else b""
    if hashlib.sha256(content).hexdigest() != said.get("sha256"):
      raise files.FormatError(
        f"{path}: expected the executable that {_beside(path).name} describes, found "
        f"{len(content):,} other bytes; write it anew with llava-sp plan --write-executable"
      )
    thread = concurrent.futures.ThreadPoolExecutor(1, "executable")
    self._loaded = thread.submit(_load, path, content, said)
    thread.shutdown(wait=False)

  def programs(self, train_state: Any) -> dict[Shapes, Any]:
    """Returns `{shapes of a batch: compiled step}` when it is loaded.

    Every process must call it. `train_state` is the state of the run, whose tree the program takes and returns.

    Raises: FormatError for a program that cannot be loaded on these devices.
    """
    found, metrics, compiled = self._loaded.result()
    results = jax.tree.structure((train_state, dict.fromkeys(metrics, 0)))

    def program(*arguments: Any) -> Any:
      return jax.tree.unflatten(results, compiled(*jax.tree.leaves(arguments)))

    processes.barrier("the executable is loaded")  # no process may run the step before all have it
    return {found: program}


def _load(path: Path, content: bytes, said: dict[str, Any]) -> tuple[Shapes, list[str], Any]:
  """Returns the shapes of a batch, the names of the metrics, and the program: leaves to leaves."""
  try:
    batch = {str(name): tuple(map(int, shape)) for name, shape in said["batch"].items()}
    arguments = jax.tree.structure(((0,) * said["arguments"], {}))
    results = jax.tree.structure([0] * said["results"])
    compiled = serialize_executable.deserialize_and_load(content, arguments, results)
  except Exception as error:  # of the runtime that loads it
    raise files.FormatError(
      f"{path}: cannot be loaded on these devices ({reason(error):.200}); write it "
      "anew, or leave --executable out"
    ) from error
  return tuple((name, batch[name]) for name in sorted(batch)), sorted(said["metrics"]), compiled


def _beside(path: Path) -> Path:
  return path.with_name(path.name + ".json")
