"""llava-sp train: trains the stage that a config describes, or continues it."""

from __future__ import annotations

from llava_sp_jax import config as config_lib
from llava_sp_jax import console, limits, storage
from llava_sp_jax.tools import arguments
from llava_sp_jax.training import STOPPED_EARLY

PROCESS_FLAGS = ("coordinator", "processes", "process")
OPTIONS = ("profile", "from-step", "allow-changed", "executable")
USAGE = """usage: llava-sp train --config FILE[:OPTIONS] --workdir DIR [--profile A:B]
                      [--from-step N] [--allow-changed NAMES] [--executable FILE]
                      [--config.GROUP.KEY=VALUE]

Trains until train.steps, or for train.epochs. The same command continues a run that was stopped or killed. When it was
asked to stop (SIGTERM, ctrl-C, a preemption notice) before that, it saves and ends with code 75.

  --config FILE[:OPTIONS]  a file with get_config(OPTIONS), e.g. configs/easy_vqa.py:stage=pretrain,
                           or the name of one that is installed: easy_vqa:stage=pretrain
  --workdir DIR            the run: config.json, checkpoints/, metrics.jsonl, quarantine.jsonl; a
                           folder, or an address in a bucket: gs://BUCKET/FOLDER
  --profile A:B            writes a trace of steps A to B to DIR/profile (xprof, TensorBoard)
  --from-step N            resumes from an older checkpoint; 0 starts again. Newer ones are kept
                           in DIR/aside. Without it: the newest whose values are what was saved
  --allow-changed NAMES    resumes although these have changed, with commas between: data,
                           tokenizer, mixture (whose sources go on where they stood)
  --executable FILE        runs the compiled step that llava-sp plan --write-executable wrote for
                           exactly this config, slice, code and versions; otherwise an error
  --config.GROUP.KEY=VALUE replaces one value (GROUP may be nested: --config.model.tower.width=64)
  --coordinator HOST:PORT --processes N --process I
                           several processes; found out on TPU pods, under SLURM, in GKE and MPI

example:
  llava-sp train --config configs/easy_vqa.py:stage=pretrain,variant=cropping --workdir runs/pretrain \\
    --config.train.steps=200

keys with their defaults, what they mean, and what they allow:
"""


def read(argv: list[str]) -> tuple[config_lib.Config, dict[str, str]]:
  """Parses the config with its overrides, and the other options by name.

  Raises: ConfigError for wrong options; FileNotFoundError for a file that a recipe needs.
  """
  optional = dict.fromkeys((*OPTIONS, *PROCESS_FLAGS), "")
  return arguments.RecipeParser("train", ("workdir",), optional).read(argv)


def main(argv: list[str]) -> int:
  """Trains a stage, or continues it.

  Returns 0 when the run is complete, 75 when it was asked to stop; the same command continues it.
  """
  if {"--help", "-h"} & set(argv):
    from llava_sp_jax.tools import config_help

    print(USAGE + config_help.text())
    return 0
  config, options = read(argv)
  limits.check(config)
  workdir = options["workdir"]
  process = {name: options[name] for name in PROCESS_FLAGS if options[name]}
  import jax

  from llava_sp_jax.checkpoints import runs
  from llava_sp_jax.distributed import processes
  from llava_sp_jax.eval.train import train
  from llava_sp_jax.training import goodput, resume

  clock = goodput.Clock(goodput.process_age())
  resumed = resume.ResumeOptions.of(options["from-step"], options["allow-changed"])
  runs.check_folder(storage.place(workdir))
  with console.patient():
    processes.start(process, config.train.peer_seconds, workdir)
    result = train(
      config,
      workdir,
      profile=options["profile"],
      resume=resumed,
      clock=clock,
      executable=options["executable"],
    )
    if jax.process_index() == 0:
      print(
        f"{workdir}: step {result.step} of {result.steps}, {result.seconds:.0f} s, "
        f"{result.quarantined} samples quarantined\n{clock.table()}"
      )
  return 0 if result.step >= result.steps else STOPPED_EARLY
