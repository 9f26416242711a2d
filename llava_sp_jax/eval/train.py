"""`llava_sp_jax.train`: one call from a config to a trained run, scored between its steps."""

from __future__ import annotations

from pathlib import Path

from llava_sp_jax import limits, recipes
from llava_sp_jax.config import Config
from llava_sp_jax.distributed import processes
from llava_sp_jax.eval.in_loop import InLoop
from llava_sp_jax.training import goodput, loop
from llava_sp_jax.training.loop import Result
from llava_sp_jax.training.resume import ResumeOptions


def train(
  config: Config | str,
  workdir: str | Path,
  *,
  profile: str = "",
  resume: ResumeOptions | None = None,
  clock: goodput.Clock | None = None,
  executable: str = "",
) -> Result:
  """Trains until `train.steps`, or for `train.epochs`; the same call continues a run that was stopped.

  Args:
    config: a config, or a recipe with its options: "configs/easy_vqa.py:stage=pretrain".
    workdir: folder of the run: config.json, checkpoints/, metrics.jsonl, quarantine.jsonl.
    profile: "A:B" writes a trace of these steps to `workdir`/profile.
    resume: the step to resume from, and inputs that may have changed (default: the newest, none).
    clock: accounts for the seconds of the run, from the start of the process (default: from now).
    executable: a file with the compiled step, from `llava-sp plan --write-executable`.

  Returns: the last step, which is smaller than `steps` when the run was asked to stop.
  Raises: ConfigError, CheckpointError, LockError: before anything is computed.
  """
  clock = clock or goodput.Clock()
  if isinstance(config, str):
    config = recipes.load(config)
  limits.check(config)
  processes.start(peer_seconds=config.train.peer_seconds)
  evaluator = InLoop(config, workdir) if config.evaluate.every else None
  return loop.train(config, workdir, profile, evaluator, resume, clock, executable)
