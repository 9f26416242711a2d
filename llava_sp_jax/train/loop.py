"""The training loop: start or continue a run, log, save, stop when asked to."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import signal
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from llava_sp_jax import checkpoint, mesh, sharding
from llava_sp_jax import config as config_lib
from llava_sp_jax.convert import load
from llava_sp_jax.data import anyres, pipeline
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.models import build
from llava_sp_jax.train import optimizer, state, step

METRICS_FILE = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Result:
  """What a call of `train` did; `step` < the config's steps when it was asked to stop early."""

  step: int
  seconds: float
  quarantined: int


def compile_step(module: Any, tx: Any, config: config_lib.Config, shardings: Any) -> Any:
  """The jitted step `(state, batch, rng) -> (state, metrics)`; the state's buffers are donated."""

  def run(*arguments: Any) -> Any:
    with nn.logical_axis_rules(sharding.activation_rules()):
      return step.train_step(module, tx, config.train.loss_chunk, *arguments)

  return jax.jit(run, donate_argnums=0, out_shardings=(shardings, None))


def initial_state(config: config_lib.Config, device_mesh: Any) -> tuple[Any, Any, Any]:
  """(state, its shardings, optimizer) at step 0, placed on the mesh."""
  params = load.initial_params(config, functools.partial(sharding.shardings, mesh=device_mesh))
  trainable, frozen = state.split(params, config)
  tx = optimizer.build(config.optimizer, config.train.steps, list(trainable))
  start = functools.partial(state.start, tx=tx)
  shardings = sharding.shardings(jax.eval_shape(start, trainable, frozen), device_mesh)
  return jax.jit(start, out_shardings=shardings)(trainable, frozen), shardings, tx


def train(config: config_lib.Config, workdir: str | Path) -> Result:
  """Trains until `config.train.steps`, continuing what `workdir` holds.

  Raises:
    ConfigError, CheckpointError: before anything is computed.
  """
  mesh.start_processes()
  folder = Path(workdir)
  checkpoint.check_config(folder, config)
  device_mesh = mesh.create(config.mesh, config.train.batch_size)
  module = build.model(config.model)
  tokenizer = Tokenizer(config.data.tokenizer)
  if len(tokenizer) > config.model.language_model.vocab_size:
    raise config_lib.ConfigError(
      f"data.tokenizer: {len(tokenizer)} tokens, but model.language_model.vocab_size is "
      f"{config.model.language_model.vocab_size}"
    )
  quarantine = pipeline.Quarantine(folder / "quarantine.jsonl")
  iterator = pipeline.make(
    config.data, tokenizer, anyres.Tile(*build.tile_shape(config.model)),
    config.train.batch_size, config.train.seed, quarantine,
    (jax.process_index(), jax.process_count()),
  )  # fmt: skip
  with jax.set_mesh(device_mesh):
    prepared = initial_state(config, device_mesh)
    if jax.process_index() == 0:  # only now: a run that could not start leaves nothing behind
      checkpoint.write_config(folder, config)
      tokenizer.save(folder / "tokenizer")
    return _run(config, folder, device_mesh, module, iterator, quarantine, prepared)


def _run(
  config: config_lib.Config, folder: Path, device_mesh: Any, module: Any, iterator: Any,
  quarantine: pipeline.Quarantine, prepared: tuple[Any, Any, Any],
) -> Result:  # fmt: skip
  train_state, shardings, tx = prepared
  print(_summary(config, train_state, device_mesh), flush=True)
  base = checkpoint.fingerprint(train_state.frozen)
  checkpoints = checkpoint.Checkpoints(folder, config.train.keep)
  if checkpoints.latest is not None:
    train_state = _resume(checkpoints, train_state, iterator, base, folder)
  first = int(train_state.step)
  checkpoint.drop_lines_after(folder / METRICS_FILE, first)
  run_step = compile_step(module, tx, config, shardings)
  rng = jax.random.key(config.train.seed)
  about = {"fingerprint": base, "name": config.name, "stage": config.optimizer.stage}
  log = Log(folder / METRICS_FILE, config)
  stop = StopRequest()
  number = first
  with stop:
    for number in range(first + 1, config.train.steps + 1):
      batch = mesh.put_batch(log.waiting(iterator), device_mesh)
      train_state, metrics = run_step(train_state, batch, rng)
      log.step(number, metrics, quarantine.count)
      asked = stop.asked or checkpoints.preempted(number)
      if asked or number % config.train.save_every == 0 or number == config.train.steps:
        checkpoints.save(number, train_state.trainable, train_state.opt_state, iterator, about)
      if asked:
        print(f"asked to stop: saved step {number}; the same command goes on from there")
        break
  checkpoints.close()
  return Result(number, log.seconds, quarantine.count)


def _resume(
  checkpoints: checkpoint.Checkpoints, fresh: Any, iterator: Any, base: str, folder: Path
) -> Any:
  number, trainable, opt_state, about = checkpoints.restore(
    fresh.trainable, fresh.opt_state, iterator
  )
  if about["fingerprint"] != base:
    raise checkpoint.CheckpointError(
      f"{folder}: its frozen base has fingerprint {about['fingerprint']}, the one named by this "
      f"config has {base}; give the base it was trained with (config.init)"
    )
  print(f"continuing {folder} from step {number}", flush=True)
  place = jax.device_put(fresh.step + number, fresh.step.sharding)
  return fresh.replace(step=place, trainable=trainable, opt_state=opt_state)


def _summary(config: config_lib.Config, train_state: Any, device_mesh: Any) -> str:
  learns = sum(x.size for x in train_state.trainable.values())
  frozen = sum(x.size for x in train_state.frozen.values())
  axes = " x ".join(f"{name} {size}" for name, size in device_mesh.shape.items())
  parts = ", ".join(f"{p} {n:,}" for p, n in build.parameter_counts(config.model).items())
  return (
    f"{config.name}: stage {config.optimizer.stage}, row {config.model.projector.row}, "
    f"{learns:,} parameters learn, {frozen:,} are frozen ({parts}); mesh {axes}"
  )


class StopRequest:
  """Notices SIGTERM (and ctrl-C) and lets the step finish."""

  def __init__(self) -> None:
    self.asked = False
    self._before: dict[int, Any] = {}

  def __enter__(self) -> StopRequest:
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._notice)
    return self

  def _notice(self, number: int, frame: Any) -> None:
    if self.asked:
      raise KeyboardInterrupt
    self.asked = True

  def __exit__(self, *_: Any) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)


class Log:
  """Metrics to a JSON-lines file and to the terminal, with rate, ETA and the share of waiting."""

  def __init__(self, path: Path, config: config_lib.Config):
    self._path, self._config = path, config
    self._started = time.monotonic()
    self._window: tuple[int, float] | None = None
    self._waited = 0.0

  @property
  def seconds(self) -> float:
    return time.monotonic() - self._started

  def waiting(self, iterator: Any) -> Any:
    """The next batch; its time is counted as waiting for input."""
    before = time.monotonic()
    batch = next(iterator)
    self._waited += time.monotonic() - before
    return batch

  def step(self, number: int, metrics: dict[str, Any], quarantined: int) -> None:
    train = self._config.train
    if self._window is None:  # the first step compiles: it does not count for the rate
      jax.block_until_ready(metrics)
      self._window, self._waited = (number, time.monotonic()), 0.0
    if number % train.log_every and number != train.steps:
      return
    values = {k: float(v) for k, v in metrics.items()}
    since, start = self._window
    elapsed = max(time.monotonic() - start, 1e-9)
    rate = (number - since) / elapsed
    record = {"step": number, **values, "steps_per_second": rate,
              "input_wait": self._waited / elapsed, "quarantined": quarantined}  # fmt: skip
    if jax.process_index():
      return
    with self._path.open("a") as file:
      file.write(json.dumps(record) + "\n")
    left = (train.steps - number) / rate if rate else math.nan
    eta = "" if math.isnan(left) else f"  eta {int(left) // 60}:{int(left) % 60:02d}"
    bad = f"  quarantined {quarantined}" if quarantined else ""
    print(
      f"step {number:>6}/{train.steps}  loss {values['loss']:.4f}  "
      f"tokens right {values['token_accuracy']:.3f}  grad {values['grad_norm']:.2f}  "
      f"{rate:.2f} steps/s{eta}{bad}",
      flush=True,
    )
