"""llava-sp profile: traces the next steps of a run that is training."""

from __future__ import annotations

import argparse

from llava_sp_jax import console, storage
from llava_sp_jax.config import ConfigError
from llava_sp_jax.tools import arguments
from llava_sp_jax.training import profiles


def parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's options."""
  result = arguments.Parser(
    prog="llava-sp profile",
    description="Asks the llava-sp train that runs in RUN for a trace of its next steps, waits for it, "
    "and prints where it is. Works on any machine that sees the folder. The run goes on; only the "
    "traced steps are slower.",
    epilog="example: llava-sp profile runs/finetune --steps 3",
  )
  result.add_argument("run", metavar="RUN", help="the --workdir of the run")
  result.add_argument(
    "--steps", default="3", help=f"how many, 1 to {profiles.MOST} (default: 3)", metavar="N"
  )
  return result


def main(argv: list[str]) -> None:
  """Waits for the trace and prints its folder.

  Raises: ProfileError when nobody trains in the folder, or no trace comes; ConfigError for another
    number of steps.
  """
  options = parser().parse_args(argv)
  steps = arguments.whole("steps", options.steps, 1)
  if steps > profiles.MOST:
    raise ConfigError(f"--steps: expected at most {profiles.MOST}, found {steps}")
  place, answer = profiles.ask(storage.place(options.run), steps, console.say)
  console.say(
    f"steps {answer.first} to {answer.last} of {answer.processes} processes: {place}\n"
    f"open it: pip install xprof tensorboard; tensorboard --logdir {place}"
  )
