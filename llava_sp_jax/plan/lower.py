"""Lowers and compiles the real programs from shapes, for absent devices, in a child process.

`plan.compile` starts it as `python -m llava_sp_jax.plan.lower REQUEST.json`, with the environment
that jax reads at import. Writes `about.json` beside the request before it compiles, and `done.json`
afterwards. Creates no arrays on a device.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_sp_jax import children
from llava_sp_jax import config as config_lib
from llava_sp_jax.data import example
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.distributed.memory import device_bytes
from llava_sp_jax.models import build, flops
from llava_sp_jax.plan import answers, gpu
from llava_sp_jax.plan import memory as memory_lib
from llava_sp_jax.plan.answers import placed
from llava_sp_jax.plan.compile import TRAIN, held
from llava_sp_jax.training import optimizer, setup

# In addition to those of the programs themselves (`setup.COMPILER_OPTIONS`).
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
  "tpu": {},
  "cuda": {"xla_gpu_enable_triton_gemm": False},  # Triton would autotune on a real GPU
}
# What a program calls its arguments, by whether it is the train step.
NAMED = {True: "arguments", False: "values"}


class Program(NamedTuple):
  """Holds a program with shapes as its arguments, not yet lowered."""

  lower: Callable[[], Any]
  arguments: Any  # a tree of placed shapes
  about: dict[str, Any]  # what the plan has to know of it


def train_step(config: config_lib.Config, device_mesh: Mesh) -> Program:
  """Returns the train step of a config for the devices of a mesh."""
  shapes, places, tx = setup.abstract_state(config, device_mesh)
  whole = NamedSharding(device_mesh, PartitionSpec())
  key = jax.eval_shape(lambda: jax.random.key(0))
  step = setup.compile_step(build.model(config.model), tx, config, places)
  arguments = (placed(shapes, places), batch(config, device_mesh))
  return Program(
    functools.partial(step.lower, *arguments, placed(key, whole)),
    arguments,
    {
      "useful_flops": useful_flops(config),
      "parameters": build.parameter_counts(config.model),
      "rows": config.train.batch_size,
    },
  )


def answering(name: str, config: config_lib.Config, device_mesh: Mesh) -> Program:
  """Returns one of the engine's programs, `name` in `answers.BESIDE`, for a mesh's devices."""
  programs, rows, held = answers.admitted(config, device_mesh)
  return Program(
    programs.traced[name].lower,
    programs.arguments[name],
    {
      "runs": programs.runs(name),
      "rows": rows.count,
      "beside": {part: held[part] for part in answers.BESIDE[name]},
      "parameters": build.parameter_counts(answers.folded(config.model)),
    },
  )


def sized(key: tuple[str | int, ...], config: config_lib.Config, device_mesh: Mesh) -> Program:
  """Returns the engine's program of a key, in `answers.ENTRIES`, for a mesh's devices."""
  programs, name = answers.alone(config, device_mesh), str(key[0])
  programs.at(key)
  about = {"parameters": build.parameter_counts(answers.folded(config.model))}
  return Program(programs.traced[name].lower, programs.arguments[name], about)


# Program -> function (config, mesh) -> Program; `compile.PROGRAMS` has their names in dumps.
LOWERINGS: dict[str, Callable[[config_lib.Config, Mesh], Program]] = {
  TRAIN: train_step,
  **{name: functools.partial(answering, name) for name in answers.BESIDE},
}


def batch(config: config_lib.Config, device_mesh: Mesh) -> dict[str, Any]:
  """Returns the shapes and dtypes of a training batch by name, sharded by rows over the mesh."""
  rows, side = config.train.batch_size, config.model.tower.image_size
  arrays = example.layout([], [], config.data.row_length).arrays()
  shapes = {name: (a.shape, a.dtype) for name, a in arrays.items()}
  shapes["images"] = ((config.data.images_per_row, side, side, 3), np.dtype(np.float32))
  place = NamedSharding(device_mesh, mesh_lib.BATCH)
  return {
    name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=place)
    for name, (shape, dtype) in shapes.items()
  }


def useful_flops(config: config_lib.Config) -> float:
  """Returns the FLOPs that the model needs for a train step (`models.flops`).

  Assumes full rows with all images, and causal attention.
  """
  stage = config.optimizer.stage
  costs = flops.costs(
    config.model, lambda path: optimizer.group_of(path, stage) != optimizer.FROZEN
  )
  rows, length = config.train.batch_size, config.data.row_length
  pairs = rows * length * (length + 1) / 2
  return costs.step(rows * length, pairs, rows * config.data.images_per_row)


def main(path: str) -> None:
  """Compiles the request in the JSON file `path`, and writes about.json and done.json beside it.

  Writes no done.json if the arguments, and what is in memory beside them, exceed that of a device:
  nothing is left to find out then, and the compiler's own messages may name another reason.
  """
  file = Path(path)
  request = json.loads(file.read_text())
  config = config_lib.from_dict(request["config"])
  if request["platform"] == "cuda":
    gpu.describe_to_jax()
  described = topologies.get_topology_desc(
    platform=request["platform"], topology_name=request["topology"], **request["arguments"]
  )
  # A batch of training must be divisible; the engine rounds its rows up.
  training = request["program"] == TRAIN
  rows = config.train.batch_size if training else None
  device_mesh = mesh_lib.create(config.mesh, rows, config.train.accumulate, list(described.devices))
  with jax.set_mesh(device_mesh):
    key = tuple(request.get("key", ()))
    make = functools.partial(sized, key) if key else LOWERINGS[request["program"]]
    program = make(config, device_mesh)
    about = {
      "coordinates": [list(getattr(d, "coords", (d.id,))) for d in device_mesh.devices.flat],
      "mesh": dict(device_mesh.shape),
      "options": request["options"],
      "arguments": by_part(NAMED[training], program.arguments),
      **program.about,
    }
    file.with_name("about.json").write_text(json.dumps(about))
    if held(about) > request["limit"]:
      return
    lowered = program.lower()
    compiled = lowered.compile(compiler_options=COMPILER_OPTIONS[request["platform"]])
  found = compiled.memory_analysis()
  memory = {f: getattr(found, f) for f in dir(found) if f.endswith("_in_bytes")}
  memory["arguments"] = argument_bytes(lowered, compiled)
  file.with_name("done.json").write_text(json.dumps(memory))


def by_part(name: str, arguments: Any) -> dict[str, int]:
  """Returns the bytes of placed shapes on one device, by part in `memory.PARTS`.

  `name` is that of the arguments in the program.
  """
  parts: dict[str, int] = {}
  for path, shape in jax.tree_util.tree_leaves_with_path(arguments):
    part = memory_lib.part_of(name + jax.tree_util.keystr(path))
    parts[part] = parts.get(part, 0) + device_bytes(shape)
  return parts


def argument_bytes(lowered: Any, compiled: Any) -> dict[str, int]:
  """Returns the bytes of each argument on one device, by names that `memory.PARTS` matches.

  Leaves out arguments that the program does not read (e.g. the key of dropout, without dropout).
  """
  named, _ = jax.tree_util.tree_flatten_with_path(lowered.args_info[0])
  places = jax.tree.leaves(compiled.input_shardings[0], is_leaf=lambda place: place is None)
  return {
    "arguments" + jax.tree_util.keystr(path): math.prod(place.shard_shape(info.shape))
    * info.dtype.itemsize
    for (path, info), place in zip(named, places, strict=True)
    if place is not None
  }


if __name__ == "__main__":
  children.end_with_parent()
  main(sys.argv[1])
