"""Counts what an engine would run to answer benchmarks, on a mesh of simulated devices.

`python -m llava_sp_jax.eval.absent REQUEST.json`, which `counted` starts, does so in a process with as
many simulated devices as the mesh has.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax import children
from llava_sp_jax import config as config_lib
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.infer.requests import Request
from llava_sp_jax.plan.questions import Counted, CountedEngine
from llava_sp_jax.results.predictions import Part
from llava_sp_jax.tasks import catalog


def counted(
  config: config_lib.Config,
  tasks: Mapping[str, str],
  mesh: tuple[int, int, int],
  batch_size: int,
  lengths: Mapping[str, int],
  parts: int = 1,
) -> dict[str, Counted]:
  """Counts what the first of `parts` processes would run for each of some benchmarks.

  Args:
    config: a model, and in `data.tokenizer` its tokenizer.
    tasks: name of a benchmark -> the folder of its files.
    mesh: sizes of data, fsdp and tensor of a process.
    batch_size: rows that decode together.
    lengths: name of a benchmark -> tokens that an answer is assumed to have, with its end.
    parts: the processes among which the questions are divided.

  Raises: RuntimeError with the output of the process, if it fails.
  """
  request = {
    "config": config_lib.to_dict(config),
    "tasks": dict(tasks),
    "mesh": list(mesh),
    "batch_size": batch_size,
    "lengths": dict(lengths),
    "parts": parts,
  }
  devices = int(np.prod(mesh))
  simulated = f"--xla_force_host_platform_device_count={devices}"
  environment = children.environment({**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": simulated})
  with tempfile.TemporaryDirectory(prefix="llava-sp-plan-") as folder:
    file = Path(folder) / "request.json"
    file.write_text(json.dumps(request))
    command = [sys.executable, "-m", "llava_sp_jax.eval.absent", str(file)]
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
      raise RuntimeError(f"counting questions failed:\n{done.stderr[-4000:]}")
    found = json.loads(file.with_name("counted.json").read_text())
  return {
    name: Counted(**{**value, "runs": {tuple(key): n for key, n in value["runs"]}})
    for name, value in found.items()
  }


def _assumed(length: int, number: int) -> int:
  """Returns the tokens that the answer to a request is assumed to have: the same for all."""
  return length


def main(path: str) -> None:
  """Counts for the request in the JSON file `path`, and writes counted.json beside it."""
  file = Path(path)
  request: dict[str, Any] = json.loads(file.read_text())
  config = config_lib.from_dict(request["config"])
  data, fsdp, tensor = request["mesh"]
  mesh = mesh_lib.create(config_lib.MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
  tokenizer = Tokenizer(config.data.tokenizer)
  results: dict[str, Any] = {}
  for name, folder in request["tasks"].items():
    task = catalog.find("--task", name)(folder)
    items = Part(0, request["parts"]).choose(task.items())
    length = functools.partial(_assumed, request["lengths"][name])
    engine = CountedEngine(config, tokenizer, mesh, request["batch_size"], task.generation, length)
    found = engine.counted(
      [Request(item.question, item.images, number=i) for i, item in enumerate(items)]
    )
    results[name] = {**vars(found), "runs": [[list(k), n] for k, n in found.runs.items()]}
    print(f"{name}: {found.questions} questions, {found.images} images", flush=True)
  file.with_name("counted.json").write_text(json.dumps(results))


if __name__ == "__main__":
  children.end_with_parent()
  main(sys.argv[1])
