"""Runs the training loop: starts or resumes a run, logs, saves, and stops on request."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax import jsonl, limits, locks, storage
from llava_sp_jax.checkpoints import fingerprints, manager, runs
from llava_sp_jax.checkpoints.local import Local
from llava_sp_jax.data import anyres, pipeline, prefetch, rows
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.distributed import mesh, processes
from llava_sp_jax.distributed.watchdog import Watchdog
from llava_sp_jax.models import build
from llava_sp_jax.training import (
  emergency,
  executables,
  goodput,
  guard,
  inputs,
  ledger,
  peers,
  preflight,
  resume,
  sinks,
  state,
  trace,
)
from llava_sp_jax.training.metrics import Log
from llava_sp_jax.training.programs import Programs
from llava_sp_jax.training.setup import compile_step, initial_state, summary
from llava_sp_jax.training.stopping import StopRequest, asked_before_the_first_step
from llava_sp_jax.training.validation import Evaluator, Validator

METRICS_FILE = sinks.METRICS_FILE


@dataclasses.dataclass(frozen=True)
class Result:
  """Reports what a call of `train` did.

  `step` is less than `steps`, those of the whole run, if the run was asked to stop early. `seconds`
  are those of the loop, without loading. `quarantined` counts the samples that were left out.
  """

  step: int
  steps: int
  seconds: float
  quarantined: int


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
    held.enter_context(clock)
    held.callback(storage.of(folder).flush)
    asked = options or resume.ResumeOptions()
    return _train(config, folder, profile, watchdog, evaluator, asked, lock, clock, executable)


@dataclasses.dataclass(frozen=True)
class _Run:
  """Holds what the steps of one call of `train` use."""

  config: config_lib.Config
  folder: Path
  mesh: Any
  iterator: pipeline.Batches
  quarantine: Quarantine
  validator: Validator
  evaluator: Evaluator | None
  profiler: trace.Profiler
  book: ledger.Ledger
  watchdog: Watchdog
  lock: locks.Lock
  clock: goodput.Clock
  options: resume.ResumeOptions
  executable: Path | None
  inputs: dict[str, Any]  # fingerprints of what is read, saved with each checkpoint
  local: Local | None  # what the disk of this host has of the run
  local_step: int  # the step that is read from there; 0: that of the run folder
  mixture: dict[str, dict[str, str]]  # weight and fingerprint of each source; {} without a mixture


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
  config = resume.with_steps_of(folder, config)
  runs.check_config(folder, config)
  sinks.check(config)
  saved = resume.first(folder, options)
  local, begun, config = emergency.opened(config, folder, saved, options.step is None)
  device_mesh = mesh.create(config.mesh, config.train.batch_size, config.train.accumulate)
  module = build.model(config.model)
  compiled = Path(executable) if executable else None
  if compiled:
    executables.check(compiled, config, device_mesh, steps=bool(begun) or not config.train.epochs)
  tokenizer = opened()
  preflight.check_config(config, tokenizer)
  read_from = read()
  known = local.held()[begun] if local and begun > saved else resume.about(folder, begun)
  changed = resume.compare_inputs(folder, begun, read_from, options.changed, known)
  others = [name for name in changed if name != "mixture"]  # of which sources go on
  before = [*known.get("inputs_before", ()), *(known["inputs"] for _ in others[:1])]
  mine, owned = mesh.rows(device_mesh, config.train.batch_size)
  quarantine = Quarantine(folder / "quarantine.jsonl", jax.process_index())
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
  )
  if not begun:
    config = resume.with_steps_for(config, iterator.stream.epoch_rows())
    preflight.check_batches(config, iterator, lambda: quarantine.count, folder)
  if compiled and not begun:  # the steps are known now
    executables.check(compiled, config, device_mesh)
  profiler = trace.Profiler(profile, folder, begun + 1, config.train.steps)
  validator = Validator(config, module, tokenizer, device_mesh)
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
    run = _Run(
      config,
      folder,
      device_mesh,
      iterator,
      quarantine,
      validator,
      evaluator,
      profiler,
      book,
      watchdog,
      lock,
      clock,
      options,
      compiled,
      {"inputs": read_from.now, "inputs_before": before},
      local,
      begun if begun > saved else 0,
      read_from.mixture,
    )
    processes.collective(
      "newer steps are set aside", lambda: resume.set_newer_aside(folder, begun), only=0
    )
    return _steps(run, module, prepared)


def _steps(run: _Run, module: Any, prepared: tuple[Any, Any, Any]) -> Result:
  config, folder = run.config, run.folder
  train_state, shardings, tx = prepared
  if jax.process_index() == 0:
    print(summary(config, train_state, run.mesh), flush=True)
  processes.barrier("parameters are placed")
  base = fingerprints.fingerprint(train_state.frozen)
  with manager.Checkpoints(folder, config.train.keep) as checkpoints:
    with run.clock.of("restore"):
      found = emergency.restore(run.local, run.local_step, train_state, base, folder)
      train_state = found or resume.restore(checkpoints, train_state, base, folder, run.options)
    return _loop(run, module, (train_state, shardings, tx), base, checkpoints)


def _loop(
  run: _Run,
  module: Any,
  prepared: tuple[Any, Any, Any],
  base: str,
  checkpoints: manager.Checkpoints,
) -> Result:
  config, folder, quarantine, book = run.config, run.folder, run.quarantine, run.book
  clock = run.clock
  train_state, shardings, tx = prepared
  first = int(train_state.step)
  if jax.process_index() == 0:
    if bad := jsonl.cut_after(folder / METRICS_FILE, first):
      print(f"{folder / METRICS_FILE}: {bad} lines could not be read and were dropped", flush=True)
    ledger.drop_after(folder, first)
  processes.barrier("logs are cut off")
  said = emergency.said(run.local, run.local_step, first) or resume.about(folder, first)
  run.iterator.resume(first, said.get("mixture"))
  with clock.of("compile"):
    known = executables.read(run.executable, train_state) if run.executable else {}
  run_step = Programs(compile_step(module, tx, config, shardings), clock, known)
  rng = jax.random.key(config.train.seed)
  about = {"fingerprint": base, "name": config.name, "stage": config.optimizer.stage, **run.inputs}
  if run.local:
    run.local.drop({first})
  if mixed := run.iterator.mixture():
    about["mixture"] = {**mixed, "sources": run.mixture}
  if run.options.step is not None:
    about["from_step"] = run.options.step
  trainable = list(train_state.trainable)
  if not jax.process_index() and first < config.train.steps and not known:
    print(f"step {first + 1}: compiling (seconds to minutes; kept for the next start)", flush=True)
  log = Log(folder, config, trainable, clock.metrics)
  skips = guard.Guard(config.train.max_nonfinite, book.skipped, len(ledger.skips(folder)))
  stop = StopRequest(several=jax.process_count() > 1)
  number, metrics, asked, noticed = first, None, False, 0.0

  def save(step: int, to: manager.Checkpoints | Local = checkpoints) -> None:
    jax.block_until_ready(metrics)
    with clock.of("save"):
      skips.settle()
      book.secure()
      storage.of(folder).flush()
      said = about if to is checkpoints else {**about, "config": config_lib.to_dict(config)}
      to.save(step, train_state.trainable, train_state.opt_state, said)
    clock.mark(step)

  clock.resumed(first)
  clock.enter("step")
  local = run.local or contextlib.nullcontext()
  with stop, log, run.profiler, local, goodput.Devices(clock) as devices:
    for number in range(first + 1, config.train.steps + 1):
      run.iterator.stopped = stop.during(f"step {number}")
      try:
        with devices.input():
          batch = log.waiting(run.iterator)
      except prefetch.Stopped:  # the previous step is the last one
        number, asked, noticed = number - 1, True, time.monotonic()
        if number > first:
          save(number)
        break
      held = batch.pop(rows.SAMPLES)
      book.step(number, rows.marks(held), rows.names(held))
      placed = mesh.put_batch(batch, run.mesh)
      with run.profiler.step(number, metrics):
        train_state, metrics = run_step(train_state, placed, rng)
      devices.computes(metrics)
      run.profiler.after(number, metrics)
      if number == 1:
        preflight.check_gradients(config, metrics, trainable)
      skips.step(number, metrics)
      if number % config.train.log_every == 0:
        skips.settle()
      validated: dict[str, float] = {}
      if run.validator.due(number):
        with log.pause(metrics), clock.of("evaluation"):
          waits = stop.during(f"the validation of step {number}")
          validated |= run.validator(train_state, waits)
      if run.evaluator and run.evaluator.due(number, number == config.train.steps):
        with log.pause(metrics), clock.of("evaluation"):
          validated |= run.evaluator(
            number,
            state.join(train_state.trainable, train_state.frozen),
            base,
            functools.partial(_may_continue, run.watchdog, stop, number),
          )
      log.step(number, {**metrics, "skipped_steps": skips.count}, quarantine.count, validated)
      asked = checkpoints.preempted(number) or stop.asked
      if number == first + 1:
        asked = asked_before_the_first_step() or asked
      noticed = time.monotonic()
      run.watchdog.beat(number)
      run.lock.check()
      if asked or number % config.train.save_every == 0 or number == config.train.steps:
        save(number)
      elif run.local and number % config.train.local_every == 0:
        save(number, run.local)
      if asked:
        break
    clock.enter("save")
    checkpoints.close()  # a signal that comes before the last step is written only asks to stop
  if run.local and number == config.train.steps:
    run.local.remove()
  if asked and jax.process_index() == 0:
    seconds = time.monotonic() - noticed
    done = f"saved step {number} in {seconds:.1f} s" if number else "nothing was trained yet"
    print(f"asked to stop: {done}; the same command resumes from there", flush=True)
  if jax.process_index() == 0:
    same = not run.inputs["inputs_before"]  # all steps have read the same samples
    usable = run.iterator.usable.items() if same else ()
    samples = {name: indices[~np.isin(indices, quarantine.of(name))] for name, indices in usable}
    print(ledger.check(folder, number, config.train.batch_size, samples), flush=True)
  return Result(number, config.train.steps, log.seconds, quarantine.count)


def _may_continue(watchdog: Watchdog, stop: StopRequest, number: int) -> bool:
  """Returns whether work between steps may continue, and tells the watchdog that it does."""
  watchdog.beat(number)
  return not stop.asked
