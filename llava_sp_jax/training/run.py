"""Runs the steps of a run that is opened: restores, trains, logs, saves, and stops on request."""

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
from llava_sp_jax import jsonl, locks, storage
from llava_sp_jax.checkpoints import fingerprints, manager
from llava_sp_jax.checkpoints.local import Local
from llava_sp_jax.data import pipeline, prefetch, rows
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.data.usable import Usable
from llava_sp_jax.distributed import mesh, processes
from llava_sp_jax.distributed.watchdog import Watchdog
from llava_sp_jax.training import (
  emergency,
  executables,
  goodput,
  guard,
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
from llava_sp_jax.training.setup import compile_step, summary
from llava_sp_jax.training.stopping import StopRequest, asked_before_the_first_step
from llava_sp_jax.training.validation import Evaluator, Validator


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


@dataclasses.dataclass(frozen=True)
class Run:
  """Holds what the steps of one call of `train` use."""

  config: config_lib.Config
  folder: Path
  mesh: Any
  iterator: pipeline.Batches
  quarantine: Quarantine
  usable: Usable
  validator: Validator
  evaluator: Evaluator | None
  profiler: trace.Profiler
  book: ledger.Ledger
  watchdog: Watchdog
  lock: locks.Lock
  clock: goodput.Clock
  options: resume.ResumeOptions
  executable: executables.Loading | None
  inputs: dict[str, Any]  # fingerprints of what is read, saved with each checkpoint
  local: Local | None  # what the disk of this host has of the run
  local_step: int  # the step that is read from there; 0: that of the run folder
  mixture: dict[str, dict[str, str]]  # weight and fingerprint of each source; {} without a mixture


def steps(run: Run, module: Any, prepared: tuple[Any, Any, Any]) -> Result:
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
  run: Run,
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
    if bad := jsonl.cut_after(folder / sinks.METRICS_FILE, first):
      print(
        f"{folder / sinks.METRICS_FILE}: {bad} lines could not be read and were dropped", flush=True
      )
    ledger.drop_after(folder, first)
  processes.barrier("logs are cut off")
  said = emergency.said(run.local, run.local_step, first) or resume.about(folder, first)
  run.iterator.resume(first, said.get("mixture"))
  with clock.of("compile"):
    known = run.executable.programs(train_state) if run.executable else {}
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

  def secure() -> None:
    book.secure()
    storage.of(folder).flush()

  def save(step: int, to: Local | None = None) -> None:
    jax.block_until_ready(metrics)
    with clock.of("save"):
      skips.settle()
      if to:
        said = {**about, "config": config_lib.to_dict(config)}
        emergency.save(to, step, train_state, said, secure)
      else:
        peers.compare_samples(run.usable)
        secure()
        checkpoints.save(step, train_state.trainable, train_state.opt_state, about)
    clock.mark(step, brief=to is not None)

  clock.resumed(first)
  clock.enter("step")
  local = run.local or contextlib.nullcontext()
  devices, noting = goodput.Devices(clock), run.watchdog.noting()
  with stop, log, run.profiler, local, devices, noting:
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
    # Whether all steps have read the same samples.
    same = not run.inputs["inputs_before"] and not run.usable.changed
    usable = run.iterator.usable.items() if same else ()
    samples = {name: indices[~np.isin(indices, quarantine.of(name))] for name, indices in usable}
    print(ledger.check(folder, number, config.train.batch_size, samples), flush=True)
  return Result(number, config.train.steps, log.seconds, quarantine.count)


def _may_continue(watchdog: Watchdog, stop: StopRequest, number: int) -> bool:
  """Returns whether work between steps may continue, and tells the watchdog that it does."""
  watchdog.beat(number)
  return not stop.asked
