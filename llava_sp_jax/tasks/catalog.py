"""Lists all benchmarks in the table TASKS; docs/benchmarks.md describes each of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from llava_sp_jax.config import ConfigError, lookup
from llava_sp_jax.tasks import own
from llava_sp_jax.tasks.easy_vqa import EasyVqa
from llava_sp_jax.tasks.gqa import Gqa
from llava_sp_jax.tasks.llava_bench import LlavaBench
from llava_sp_jax.tasks.mmbench import MmBench
from llava_sp_jax.tasks.mmbench_cn import MmBenchCn
from llava_sp_jax.tasks.mme import Mme
from llava_sp_jax.tasks.mmvet import MmVet
from llava_sp_jax.tasks.pope import Pope
from llava_sp_jax.tasks.scienceqa import ScienceQa
from llava_sp_jax.tasks.seed import Seed
from llava_sp_jax.tasks.textvqa import TextVqa
from llava_sp_jax.tasks.vizwiz import VizWiz
from llava_sp_jax.tasks.vqa_json import VqaJson
from llava_sp_jax.tasks.vqav2 import VqaV2

# The twelve of the paper, in the order of its table.
BENCHMARKS = (
  VqaV2, Gqa, VizWiz, ScienceQa, TextVqa, Pope, Mme, MmBench, MmBenchCn, Seed, LlavaBench, MmVet,
)  # fmt: skip

# name -> class. Its constructor takes the folder of the data, and the options that `options` lists.
TASKS: dict[str, Any] = {task.name: task for task in (EasyVqa, *BENCHMARKS, VqaJson)}

# The members that a task of a user's own file must have: see tasks.task.Task.
MEMBERS = ("name", "protocol", "generation", "items", "data_hash", "verdict", "score", "submission")
ON_CLASS = tuple(m for m in MEMBERS if m != "protocol")  # the constructor may set the protocol


def find(key: str, name: str) -> Any:
  """Returns the class of a task from its name in TASKS, or from FILE.py:Class.

  Runs the file in the latter case. `key` is the setting that gave the name, for messages.

  Raises: ConfigError for an unknown name, a file that cannot be run, or a class that is not a task.
  """
  path, colon, wanted = name.rpartition(":")
  if not (colon and path.endswith(".py")):
    return lookup(key, name, TASKS)
  spec = importlib.util.spec_from_file_location(Path(path).stem, path)
  if spec is None or spec.loader is None or not Path(path).is_file():
    raise ConfigError(f"{key} {name}: no file {path}")
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except (Exception, SystemExit) as error:
    raise ConfigError(f"{key} {name}: {path} ends with {type(error).__name__}: {error}") from error
  found = getattr(module, wanted, None)
  if not isinstance(found, type):
    classes = [k for k, v in vars(module).items() if isinstance(v, type)]
    raise ConfigError(f"{key} {name}: no class {wanted!r}; it has {', '.join(classes) or 'none'}")
  if absent := [member for member in ON_CLASS if not hasattr(found, member)]:
    raise ConfigError(f"{key} {name}: no task: without {', '.join(absent)} (see tasks.task.Task)")
  return own.guarded(found, path)
