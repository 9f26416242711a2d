"""Runs the training loop: starts or resumes a run, logs, saves, and stops on request."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax import jsonl, limits, locks, storage
from llava_sp_jax.checkpoints import fingerprints, manager, runs
from llava_sp_jax.convert import places
from llava_sp_jax.data import anyres, pipeline, prefetch, validation_split
from llava_sp_jax.data.quarantine import Quarantine
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.distributed import mesh, processes
from llava_sp_jax.distributed.watchdog import Watchdog
from llava_sp_jax.models import build
from llava_sp_jax.models.parameters import Params
from llava_sp_jax.training import (
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
from llava_sp_jax.training.setup import compile_step, initial_state
from llava_sp_jax.training.stopping import StopRequest
from llava_sp_jax.training.validation import Validator

METRICS_FILE = sinks.METRICS_FILE


@dataclasses.dataclass(frozen=True)
class Result:
  """Reports what a call of `train` did.

  `step` is less than the steps of the config if the run was asked to stop early. `seconds` are
  those of the loop, without loading. `quarantined` counts the samples that were left out.
  """

  step: int
  seconds: float
  quarantined: int


class Evaluator(Protocol):
  """Scores the model between steps; `eval.in_loop` implements it on a higher layer."""

  def due(self, number: int) -> bool:
    """Returns whether the model is evaluated after step `number`."""
    ...

  def __call__(
    self, number: int, params: Params, fingerprint: str, going: Callable[[], bool]
  ) -> dict[str, float]:
    """Returns the metrics of step `number`, by name.

    `params` are nested. `fingerprint` is that of the frozen parameters. It must call `going` often
    and give up when that returns False, because the run was asked to stop.
    """
    ...


def train(
  config: config_lib.Config,
  workdir: str | Path,
  profile: str = "",
  evaluator: Evaluator | None = None,
  options: resume.ResumeOptions | None = None,
) -> Result:
  """Trains until `config.train.steps`, and resumes what `workdir` holds.

  Args:
    config: what is trained, and how.
    workdir: the run folder, which is locked meanwhile.
    profile: "A:B" writes a trace of these steps to `workdir`/profile; "" none.
    evaluator: evaluates between steps; needed if `evaluate.every` is above 0.
    options: the step to resume from, and inputs that may differ; None is the newest, and none.

  Raises:
    ConfigError, CheckpointError, LockError: before anything is computed.
  """
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
    held.callback(storage.of(folder).flush)
    return _train(
      config, folder, profile, watchdog, evaluator, options or resume.ResumeOptions(), lock
    )


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
  options: resume.ResumeOptions
  inputs: dict[str, Any]  # fingerprints of what is read, saved with each checkpoint


def open_tokenizer(config: config_lib.Config) -> Tokenizer:
  """Opens the tokenizer that `data.tokenizer` names, from a folder or the Hugging Face hub.

  Raises: FormatError if it cannot be fetched; FileNotFoundError, TokenizerError if the folder holds
    none.
  """
  return Tokenizer(places.tokenizer(config.data.tokenizer))


def _inputs(config: config_lib.Config) -> dict[str, str]:
  """Returns the fingerprints of `resume.INPUTS`; reads the file of samples, but no images."""
  tile = anyres.Tile(*build.tile_shape(config.model))
  source, _ = pipeline.open_source(config.data, tile, validation_split.TRAIN)
  return {"data": source.fingerprint()[:16], "tokenizer": open_tokenizer(config).fingerprint()[:16]}


def validation_input(config: config_lib.Config) -> dict[str, str]:
  """Returns {"validation data": fingerprint of `data.validation_path`}, or {} without such a file.

  All processes need the same file, because validation figures are sums over all of them.
  """
  if not (config.train.validate_every and config.data.validation_path):
    return {}
  tile = anyres.Tile(*build.tile_shape(config.model))
  source, _ = pipeline.open_source(config.data, tile, validation_split.VALIDATION)
  return {"validation data": source.fingerprint()[:16]}


def _train(
  config: config_lib.Config,
  folder: Path,
  profile: str,
  watchdog: Watchdog,
  evaluator: Evaluator | None,
  options: resume.ResumeOptions,
  lock: locks.Lock,
) -> Result:
  read = functools.cache(functools.partial(_inputs, config))
  if jax.process_count() > 1:
    peers.compare(peers.facts(config, lambda: {**read(), **validation_input(config)}))
  runs.check_config(folder, config)
  sinks.check(config)
  begun = resume.first(folder, options)
  profiler = trace.Profiler(profile, folder, begun + 1, config.train.steps)
  device_mesh = mesh.create(config.mesh, config.train.batch_size, config.train.accumulate)
  module = build.model(config.model)
  tokenizer = open_tokenizer(config)
  preflight.check_config(config, tokenizer)
  inputs = read()
  changed = resume.compare_inputs(folder, begun, inputs, options.changed)
  known = resume.about(folder, begun)
  before = [*known.get("inputs_before", ()), *(known["inputs"] for _ in changed[:1])]
  rows, owned = mesh.rows(device_mesh, config.train.batch_size)
  quarantine = Quarantine(folder / "quarantine.jsonl", jax.process_index())
  iterator = pipeline.make(
    config.data,
    tokenizer,
    anyres.Tile(*build.tile_shape(config.model)),
    config.train.batch_size,
    config.train.seed,
    quarantine,
    rows.tolist(),
    folder=folder,
    say=print,
  )
  if not begun:
    preflight.check_batches(config, iterator, lambda: quarantine.count, folder)
  validator = Validator(config, module, tokenizer, device_mesh)
  processes.barrier("data is opened")
  with jax.set_mesh(device_mesh):
    prepared = initial_state(config, device_mesh)
    if jax.process_index() == 0:  # only now, so that a run that could not start leaves no files
      runs.write_config(folder, config)
      with storage.filled(folder / "tokenizer") as made:
        tokenizer.save(made)
    book = ledger.Ledger(folder, jax.process_index(), rows.tolist(), owned.tolist())
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
      options,
      {"inputs": inputs, "inputs_before": before},
    )
    processes.collective(
      "newer steps are set aside", lambda: resume.set_newer_aside(folder, begun), only=0
    )
    return _steps(run, module, prepared)


def _steps(run: _Run, module: Any, prepared: tuple[Any, Any, Any]) -> Result:
  config, folder = run.config, run.folder
  train_state, shardings, tx = prepared
  if jax.process_index() == 0:
    print(_summary(config, train_state, run.mesh), flush=True)
  processes.barrier("parameters are placed")
  base = fingerprints.fingerprint(train_state.frozen)
  with manager.Checkpoints(folder, config.train.keep) as checkpoints:
    train_state = resume.restore(checkpoints, train_state, base, folder, run.options)
    return _loop(run, module, (train_state, shardings, tx), base, checkpoints)


def _loop(
  run: _Run,
  module: Any,
  prepared: tuple[Any, Any, Any],
  base: str,
  checkpoints: manager.Checkpoints,
) -> Result:
  config, folder, quarantine, book = run.config, run.folder, run.quarantine, run.book
  train_state, shardings, tx = prepared
  first = int(train_state.step)
  if jax.process_index() == 0:
    if bad := jsonl.cut_after(folder / METRICS_FILE, first):
      print(f"{folder / METRICS_FILE}: {bad} lines could not be read and were dropped", flush=True)
    ledger.drop_after(folder, first)
  processes.barrier("logs are cut off")
  run.iterator.seek(first)
  run_step = compile_step(module, tx, config, shardings)
  rng = jax.random.key(config.train.seed)
  about = {"fingerprint": base, "name": config.name, "stage": config.optimizer.stage, **run.inputs}
  if run.options.step is not None:
    about["from_step"] = run.options.step
  trainable = list(train_state.trainable)
  if not jax.process_index() and first < config.train.steps:
    print(f"step {first + 1}: compiling (seconds to minutes; kept for the next start)", flush=True)
  log = Log(folder, config, trainable)
  skips = guard.Guard(config.train.max_nonfinite, book.skipped, len(ledger.skips(folder)))
  stop = StopRequest(several=jax.process_count() > 1)
  number, metrics, asked, noticed = first, None, False, 0.0

  def save(step: int) -> None:
    skips.settle()
    book.secure()
    storage.of(folder).flush()
    checkpoints.save(step, train_state.trainable, train_state.opt_state, about)

  with stop, log, run.profiler:
    for number in range(first + 1, config.train.steps + 1):
      run.iterator.stopped = stop.during(f"step {number}")
      try:
        batch = log.waiting(run.iterator)
      except prefetch.Stopped:  # the previous step is the last one
        number, asked, noticed = number - 1, True, time.monotonic()
        if number > first:
          save(number)
        break
      book.step(number, pipeline.marks(batch.pop(pipeline.SAMPLES)))
      placed = mesh.put_batch(batch, run.mesh)
      # No process may run the step before all have compiled it.
      if number == first + 1 and jax.process_count() > 1:
        run_step.lower(train_state, placed, rng).compile()
        processes.barrier("the step is compiled")
      with run.profiler.step(number, metrics):
        train_state, metrics = run_step(train_state, placed, rng)
      run.profiler.after(number, metrics)
      if number == 1:
        preflight.check_gradients(config, metrics, trainable)
      skips.step(number, metrics)
      if number % config.train.log_every == 0:
        skips.settle()
      validated: dict[str, float] = {}
      if run.validator.due(number):
        with log.pause(metrics):
          waits = stop.during(f"the validation of step {number}")
          validated |= run.validator(train_state, waits)
      if run.evaluator and run.evaluator.due(number):
        with log.pause(metrics):
          validated |= run.evaluator(
            number,
            state.join(train_state.trainable, train_state.frozen),
            base,
            functools.partial(_may_continue, run.watchdog, stop, number),
          )
      log.step(number, {**metrics, "skipped_steps": skips.count}, quarantine.count, validated)
      asked = checkpoints.preempted(number) or stop.asked
      noticed = time.monotonic()
      run.watchdog.beat(number)
      run.lock.check()
      if asked or number % config.train.save_every == 0 or number == config.train.steps:
        save(number)
      if asked:
        break
  checkpoints.close()
  if asked and jax.process_index() == 0:
    seconds = time.monotonic() - noticed
    done = f"saved step {number} in {seconds:.1f} s" if number else "nothing was trained yet"
    print(f"asked to stop: {done}; the same command resumes from there", flush=True)
  if jax.process_index() == 0:
    same = not run.inputs["inputs_before"]  # all steps have read the same samples
    samples = [i for i in run.iterator.usable if i not in quarantine and same]
    print(ledger.check(folder, number, config.train.batch_size, samples), flush=True)
  return Result(number, log.seconds, quarantine.count)


def _may_continue(watchdog: Watchdog, stop: StopRequest, number: int) -> bool:
  """Returns whether work between steps may continue, and tells the watchdog that it does."""
  watchdog.beat(number)
  return not stop.asked


def _summary(config: config_lib.Config, train_state: Any, device_mesh: Any) -> str:
  trainable = sum(x.size for x in train_state.trainable.values())
  frozen = sum(x.size for x in train_state.frozen.values())
  axes = " x ".join(f"{name} {size}" for name, size in device_mesh.shape.items())
  parts = ", ".join(f"{p} {n:,}" for p, n in build.parameter_counts(config.model).items())
  return (
    f"{config.name}: stage {config.optimizer.stage}, variant {config.model.projector.variant}, "
    f"{trainable:,} trainable parameters, {frozen:,} frozen ({parts}); mesh {axes}"
  )
