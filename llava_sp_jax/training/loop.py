"""Starts or resumes a run: locks its folder, opens all that it reads, and hands it to `run`."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax import limits, locks, storage
from llava_sp_jax.checkpoints import on_disk, runs
from llava_sp_jax.data import anyres, pipeline
from llava_sp_jax.data.quarantine import Quarantine, forget
from llava_sp_jax.data.usable import Usable
from llava_sp_jax.distributed import mesh, processes
from llava_sp_jax.distributed.watchdog import Watchdog
from llava_sp_jax.models import build
from llava_sp_jax.training import (
  emergency,
  executables,
  goodput,
  inputs,
  ledger,
  peers,
  preflight,
  resume,
  sinks,
  trace,
)
from llava_sp_jax.training.run import Result, Run, steps
from llava_sp_jax.training.setup import initial_state
from llava_sp_jax.training.validation import Evaluator, Validator

__all__ = ["METRICS_FILE", "Result", "train"]

METRICS_FILE = sinks.METRICS_FILE


def train(
  config: config_lib.Config,
  workdir: str | Path,
  profile: str = "",
  evaluator: Evaluator | None = None,
  options: resume.ResumeOptions | None = None,
  clock: goodput.Clock | None = None,
  executable: str = "",
) -> Result:
  """Trains until `train.steps`, or for `train.epochs`, and resumes what `workdir` holds.

  Args:
    config: what is trained, and how.
    workdir: the run folder, which is locked meanwhile.
    profile: "A:B" writes a trace of these steps to `workdir`/profile; "" none.
    evaluator: evaluates between steps; needed if `evaluate.every` is above 0.
    options: the step to resume from, and inputs that may differ; None is the newest, and none.
    clock: accounts for the seconds of the run, from the start of the process; None begins now.
    executable: a file with the compiled step, for exactly this run (`executables.write`); "" none.

  Raises:
    ConfigError, CheckpointError, LockError: before anything is computed.
  """
  clock = clock or goodput.Clock()
  limits.check(config)
  if config.evaluate.every and evaluator is None:
    raise config_lib.ConfigError(
      "evaluate.every: nothing to evaluate with; train(..., evaluator=eval.in_loop.InLoop(...))"
    )
  processes.start(peer_seconds=config.train.peer_seconds)
  with Watchdog(config.train.stall_seconds) as watchdog, contextlib.ExitStack() as held:
    folder = storage.place(workdir)
    lock = locks.Lock(folder, "llava-sp train")

    def begin() -> None:
      runs.check_folder(folder)
      held.enter_context(lock)

    processes.collective("the run folder is locked", begin, only=0)
    peers.compare_folders(folder, lock)
    held.enter_context(clock)
    held.callback(storage.of(folder).flush)
    asked = options or resume.ResumeOptions()
    return _train(config, folder, profile, watchdog, evaluator, asked, lock, clock, executable)


def _train(
  config: config_lib.Config,
  folder: Path,
  profile: str,
  watchdog: Watchdog,
  evaluator: Evaluator | None,
  options: resume.ResumeOptions,
  lock: locks.Lock,
  clock: goodput.Clock,
  executable: str,
) -> Result:
  opened = functools.cache(functools.partial(inputs.open_tokenizer, config))
  read = functools.cache(lambda: inputs.fingerprints(config, opened()))
  if jax.process_count() > 1:
    peers.compare(peers.facts(config, lambda: {**read().now, **inputs.validation_input(config)}))
  sinks.check(config)
  config, saved = resume.begin(folder, config, options)
  local, begun, config = emergency.opened(config, folder, saved, options.step is None)
  device_mesh = mesh.create(config.mesh, config.train.batch_size, config.train.accumulate)
  module = build.model(config.model)
  compiled, loading = Path(executable) if executable else None, None
  if compiled:
    executables.check(compiled, config, device_mesh, steps=bool(begun) or not config.train.epochs)
    loading = executables.Loading(compiled)
  tokenizer = opened()
  preflight.check_config(config, tokenizer)
  read_from = read()
  known = local.held()[begun] if local and begun > saved else resume.about(folder, begun)
  changed = resume.compare_inputs(folder, begun, read_from, options.changed, known)
  others = [name for name in changed if name != "mixture"]  # of which sources go on
  before = [*known.get("inputs_before", ()), *(known["inputs"] for _ in others[:1])]
  mine, owned = mesh.rows(device_mesh, config.train.batch_size)
  bad = folder / "quarantine.jsonl"
  if not processes.agreed("steps are listed", lambda: on_disk.steps(folder)) and not begun:
    # What an attempt without a checkpoint has found may be mended.
    processes.collective("the quarantine is empty", lambda: forget(bad), only=0)
  quarantine = Quarantine(bad, jax.process_index())
  may_change = bool(options.changed & {"data", "mixture"})
  usable = Usable(folder, bool(begun), not jax.process_index(), may_change)
  iterator = pipeline.make(
    config.data,
    tokenizer,
    anyres.Tile(*build.tile_shape(config.model)),
    config.train.batch_size,
    config.train.seed,
    quarantine,
    mine.tolist(),
    folder=folder,
    say=print,
    hosts=inputs.hosts(),
    usable=usable,
  )
  if not begun:
    config = resume.with_steps_for(config, iterator.stream.epoch_rows())
    preflight.check_batches(config, iterator, lambda: quarantine.count, folder)
  if compiled and not begun:  # the steps are known now
    executables.check(compiled, config, device_mesh)
  profiler = trace.Profiler(profile, folder, begun + 1, config.train.steps)
  validator = Validator(config, module, tokenizer, device_mesh, folder, usable)
  processes.barrier("data is opened")
  with jax.set_mesh(device_mesh):
    if jax.process_index() == 0 and (folder / goodput.FILE).is_file():
      clock.keep(folder)
    prepared = initial_state(config, device_mesh)
    if jax.process_index() == 0:  # only now, so that a run that could not start leaves no files
      runs.write_config(folder, config)
      emergency.name_run(local, folder)
      with storage.filled(folder / "tokenizer") as made:
        tokenizer.save(made)
      clock.keep(folder)
    book = ledger.Ledger(folder, jax.process_index(), mine.tolist(), owned.tolist())
    run = Run(
      config,
      folder,
      device_mesh,
      iterator,
      quarantine,
      usable,
      validator,
      evaluator,
      profiler,
      book,
      watchdog,
      lock,
      clock,
      options,
      loading,
      {"inputs": read_from.now, "inputs_before": before},
      local,
      begun if begun > saved else 0,
      read_from.mixture,
    )
    if local:  # first, so that none is newer than what a start that is killed here leaves
      local.drop({begun})
    processes.collective(
      "newer steps are set aside", lambda: resume.set_newer_aside(folder, begun), only=0
    )
    processes.collective("what cannot be used is noted", usable.begin)
    return steps(run, module, prepared)
