"""Lowers and compiles the real step from shapes, for absent devices, in a child process.

`plan.compile` starts it as `python -m llava_sp_jax.plan.lower REQUEST.json`, with the environment
that jax reads at import. Writes `about.json` beside the request before it compiles, and `done.json`
afterwards. Creates no arrays.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import example
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.distributed import sharding
from llava_sp_jax.infer import generate
from llava_sp_jax.models import build, flops
from llava_sp_jax.models.quantize import is_quantized
from llava_sp_jax.plan.compile import PROGRAMS
from llava_sp_jax.training import optimizer, setup

# In addition to those of the step itself (`setup.COMPILER_OPTIONS`).
COMPILER_OPTIONS: dict[str, dict[str, Any]] = {
  "tpu": {},
  "cuda": {"xla_gpu_enable_triton_gemm": False},  # Triton would autotune on a real GPU
}
NEW_TOKENS = 128  # tokens of an answer in the plan of an evaluation


def train_step(config: config_lib.Config, device_mesh: Mesh) -> Any:
  """Lowers the train step of a config for the devices of a mesh; nothing is compiled yet."""
  shapes, places, tx = setup.abstract_state(config, device_mesh)
  whole = NamedSharding(device_mesh, PartitionSpec())
  key = jax.eval_shape(lambda: jax.random.key(0))
  step = setup.compile_step(build.model(config.model), tx, config, places)
  return step.lower(placed(shapes, places), batch(config, device_mesh), placed(key, whole))


def answers(config: config_lib.Config, device_mesh: Mesh) -> Any:
  """Lowers the generation of a config: prefill of full rows, then a loop of decode steps.

  `device_mesh` has the devices, which may be absent.
  """
  platform = device_mesh.devices.flat[0].platform
  module = build.compiled_for(build.model(config.model), platform, branches=False)
  dtype = jnp.dtype(config.model.dtype)
  stored = flatten_dict(build.abstract(config.model), sep="/")
  cast = {
    p: s if is_quantized(p) else jax.ShapeDtypeStruct(s.shape, dtype) for p, s in stored.items()
  }
  params = unflatten_dict(cast, sep="/")
  params = placed(params, sharding.shardings(params, device_mesh))
  prompt = {k: v for k, v in batch(config, device_mesh).items() if k not in _LEARNING}

  def program(params: Any, prompt: Any) -> Any:
    return generate.generate(module, params, prompt, stop_ids=(2,), max_new_tokens=NEW_TOKENS)

  program.__name__ = PROGRAMS["eval"]
  options = setup.COMPILER_OPTIONS.get(platform)
  return jax.jit(program, compiler_options=options).lower(params, prompt)


_LEARNING = ("targets", "weights")  # arrays of a batch that only training reads
# Value of --what -> function (config, mesh) -> lowered. PROGRAMS has the names of their programs.
LOWERINGS: dict[str, Callable[[config_lib.Config, Mesh], Any]] = {
  "train": train_step,
  "eval": answers,
}


def placed(shapes: Any, places: Any) -> Any:
  """Returns a tree of shapes with shardings, as `jit(...).lower` takes them.

  `places` is a tree of shardings, or one sharding for all shapes.
  """
  if isinstance(places, NamedSharding):
    places = jax.tree.map(lambda _: places, shapes)
  return jax.tree.map(
    lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places
  )


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


def useful_flops(config: config_lib.Config, what: str) -> float:
  """Returns the FLOPs that the model needs for a train step (`models.flops`).

  `what` is "train"; 0 for an evaluation. Assumes full rows with all images, and causal attention.
  """
  if what != "train":
    return 0.0
  stage = config.optimizer.stage
  costs = flops.costs(
    config.model, lambda path: optimizer.group_of(path, stage) != optimizer.FROZEN
  )
  rows, length = config.train.batch_size, config.data.row_length
  pairs = rows * length * (length + 1) / 2
  return costs.step(rows * length, pairs, rows * config.data.images_per_row)


def main(path: str) -> None:
  """Compiles the request in the JSON file `path`, and writes about.json and done.json beside it."""
  file = Path(path)
  request = json.loads(file.read_text())
  config = config_lib.from_dict(request["config"])
  described = topologies.get_topology_desc(
    platform=request["platform"], topology_name=request["topology"], **request["arguments"]
  )
  device_mesh = mesh_lib.create(
    config.mesh, config.train.batch_size, config.train.accumulate, list(described.devices)
  )
  devices = list(device_mesh.devices.flat)
  about = {
    "coordinates": [list(getattr(d, "coords", (d.id,))) for d in devices],
    "mesh": dict(device_mesh.shape),
    "useful_flops": useful_flops(config, request["what"]),
    "parameters": build.parameter_counts(config.model),
  }
  file.with_name("about.json").write_text(json.dumps(about))
  with jax.set_mesh(device_mesh):
    lowered = LOWERINGS[request["what"]](config, device_mesh)
    compiled = lowered.compile(compiler_options=COMPILER_OPTIONS[request["platform"]])
  found = compiled.memory_analysis()
  memory = {f: getattr(found, f) for f in dir(found) if f.endswith("_in_bytes")}
  memory["arguments"] = argument_bytes(lowered, compiled)
  file.with_name("done.json").write_text(json.dumps(memory))


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
  main(sys.argv[1])
