"""llava-sp train: trains the stage that a config describes, or continues it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from llava_sp_jax import config as config_lib
from llava_sp_jax import console, limits, recipes
from llava_sp_jax.errors import LlavaSPError
from llava_sp_jax.tools import arguments
from llava_sp_jax.training import STOPPED_EARLY

PROCESS_FLAGS = ("coordinator", "processes", "process")
FLAGS = ("config", "workdir", "profile", "from-step", "allow-changed")
USAGE = """usage: llava-sp train --config FILE[:OPTIONS] --workdir DIR [--profile A:B]
                      [--from-step N] [--allow-changed NAMES] [--config.GROUP.KEY=VALUE]

Trains until train.steps. The same command continues a run that was stopped or killed. When it was
asked to stop (SIGTERM, ctrl-C, a preemption notice) before that, it saves and ends with code 75.

  --config FILE[:OPTIONS]  a file with get_config(OPTIONS), e.g. configs/easy_vqa.py:stage=pretrain,
                           or the name of one that is installed: easy_vqa:stage=pretrain
  --workdir DIR            the run: config.json, checkpoints/, metrics.jsonl, quarantine.jsonl
  --profile A:B            writes a trace of steps A to B to DIR/profile (xprof, TensorBoard)
  --from-step N            goes on from an older checkpoint, 0 from the start; newer ones are kept
                           in DIR/aside. Without it: the newest whose values are what was saved
  --allow-changed NAMES    goes on although these are not what they were: data, tokenizer, or both
                           with a comma
  --config.GROUP.KEY=VALUE replaces one value (GROUP may be nested: --config.model.tower.width=64)
  --coordinator HOST:PORT --processes N --process I
                           several processes; found out on TPU pods, under SLURM, in GKE and MPI

example:
  llava-sp train --config configs/easy_vqa.py:stage=pretrain,variant=cropping --workdir runs/pretrain \\
    --config.train.steps=200

keys with their defaults, what they mean, and what they allow:
"""


def read_config(argv: list[str]) -> tuple[config_lib.Config, str]:
  """--config with its overrides, and --workdir. Raises: ConfigError, FileNotFoundError."""
  given = {name: text for name, text in flags(argv).items() if name not in PROCESS_FLAGS}
  overrides = {name: text for name, text in given.items() if name.startswith("config.")}
  problems = [f"no --{name}" for name in ("config", "workdir") if not given.get(name)]
  if unknown := [f"--{name}" for name in given if name not in (*FLAGS, *overrides)]:
    problems.append(
      arguments.unknown_options(unknown, [f"--{n}" for n in (*FLAGS, *PROCESS_FLAGS)])
    )
  if problems:
    raise config_lib.ConfigError(
      f"{', '.join(problems)}; expected --config FILE[:OPTIONS] --workdir DIR "
      "[--profile A:B] [--config.GROUP.KEY=VALUE ...]; see llava-sp train --help"
    )
  return config_lib.override(load_recipe(given["config"]), overrides), given["workdir"]


def flags(argv: list[str]) -> dict[str, str]:
  """`--name=text` and `--name text` as {name: text}; the last of a name wins."""
  given, rest = {}, list(argv)
  while rest:
    flag = rest.pop(0)
    name, equals, text = flag.removeprefix("--").partition("=")
    if not flag.startswith("--") or not name:
      raise config_lib.ConfigError(f"unexpected {flag!r}; see llava-sp train --help")
    if not equals:
      if not rest or rest[0].startswith("--"):
        raise config_lib.ConfigError(f"--{name}: expected a value after it")
      text = rest.pop(0)
    given[name] = text
  return given


def load_recipe(value: str) -> config_lib.Config:
  """The config of `RECIPE[:OPTIONS]`, a file or a known name; what it leaves out has its default.

  Raises: ConfigError, also for whatever a recipe ends with.
  """
  name, _, options = value.partition(":")
  file = str(recipes.find(name))
  spec = importlib.util.spec_from_file_location("recipe", file)
  if spec is None or spec.loader is None:
    raise config_lib.ConfigError(f"--config: {file!r} is not a Python file (.py)")
  recipe = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(recipe)
    if not hasattr(recipe, "get_config"):
      raise config_lib.ConfigError(f"--config: {file!r} has no function get_config")
    made = recipe.get_config(*filter(None, [options]))
    if not hasattr(made, "to_dict"):
      raise config_lib.ConfigError(
        f"--config: get_config of {file!r} returned {made!r:.40}, expected an ml_collections.ConfigDict"
      )
    values = made.to_dict()
  except (Exception, SystemExit) as error:  # one that leaves has told us nothing to train
    if isinstance(error, LlavaSPError | OSError):
      raise
    why = f"{type(error).__name__}: {error}"
    raise config_lib.ConfigError(f"--config: {file} ends with {why}") from error
  return config_lib.from_dict(values)


def main(argv: list[str]) -> int:
  """Trains. Returns 0 when the run is complete, STOPPED_EARLY when the same command goes on."""
  if {"--help", "-h"} & set(argv):
    from llava_sp_jax.tools import config_help

    print(USAGE + config_help.text())
    return 0
  config, workdir = read_config(argv)
  limits.check(config)
  given = flags(argv)
  process = {name: text for name, text in given.items() if name in PROCESS_FLAGS}
  import jax

  from llava_sp_jax.checkpoints import runs
  from llava_sp_jax.distributed import processes
  from llava_sp_jax.training import loop, resume

  options = resume.ResumeOptions.of(given.get("from-step", ""), given.get("allow-changed", ""))
  runs.check_folder(Path(workdir))
  with console.patient():
    processes.start(process, config.train.peer_seconds, workdir)
    evaluator = None
    if config.evaluate.every:
      from llava_sp_jax.eval import in_loop

      evaluator = in_loop.InLoop(config, workdir)
    result = loop.train(config, workdir, given.get("profile", ""), evaluator, options)
    if jax.process_index() == 0:
      print(
        f"{workdir}: step {result.step} of {config.train.steps}, {result.seconds:.0f} s, "
        f"{result.quarantined} samples quarantined"
      )
  return 0 if result.step >= config.train.steps else STOPPED_EARLY
