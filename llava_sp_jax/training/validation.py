"""Scores a model between the steps of a run: loss and accuracy on the validation split, benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import flax.linen as nn
import jax

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import anyres, pipeline, prefetch, rows, validation_split
from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.data.usable import Usable
from llava_sp_jax.distributed import mesh, sharding
from llava_sp_jax.models import build
from llava_sp_jax.models.parameters import Params
from llava_sp_jax.training import inputs, state, step


class Evaluator(Protocol):
  """Scores the model between steps; `eval.in_loop` implements it on a higher layer."""

  def due(self, number: int, last: bool) -> bool:
    """Returns whether the model is evaluated after step `number`; `last` if the run ends with it."""
    ...

  def __call__(
    self, number: int, params: Params, fingerprint: str, going: Callable[[], bool]
  ) -> dict[str, float]:
    """Returns the metrics of step `number`, by name.

    `params` are nested. `fingerprint` is that of the frozen parameters. It must call `going` often
    and give up when that returns False, because the run was asked to stop.
    """
    ...


class Validator:
  """Scores the same batches each time, without dropout and without moving the training data.

  Of n samples of the validation split, min(train.validate_batches, n // batch) batches are scored,
  at least one. So no sample counts twice, unless there is less than one batch. Quarantined samples
  are left out.
  """

  def __init__(
    self,
    config: config_lib.Config,
    module: Any,
    tokenizer: Tokenizer,
    device_mesh: Any,
    folder: Path | None = None,
    usable: Usable | None = None,
  ):
    """Opens the validation split, if `train.validate_every` asks for validation.

    `folder` keeps the sizes of its samples, and `usable` is that of the run; as in `pipeline.make`.

    Raises: ConfigError, FileNotFoundError when the validation data cannot be used.
    """
    self._train, self._mesh = config.train, device_mesh
    self._iterator, self._count = None, 0
    if not config.train.validate_every:
      validation_split.of_split(config.data, validation_split.TRAIN)
      return
    if config.train.validate_batches < 1:
      raise config_lib.ConfigError(
        f"train.validate_batches: expected at least 1, found {config.train.validate_batches}"
      )
    tile = anyres.Tile(*build.tile_shape(config.model))
    rows = config.train.batch_size
    parts = pipeline.open_parts(config.data, tile, validation_split.VALIDATION)
    samples = sum(len(part.members) for part in parts)
    self._count = max(1, min(config.train.validate_batches, samples // rows))
    mine, _ = mesh.rows(device_mesh, rows)
    self._iterator = pipeline.make(
      config.data,
      tokenizer,
      tile,
      rows,
      config.train.seed,
      None,
      mine.tolist(),
      validation_split.VALIDATION,
      folder,
      hosts=inputs.hosts(),
      usable=usable,
    )
    self._start = self._iterator.get_state()
    next(self._iterator)  # reports unusable samples now, not at the first validation

    def sums(trainable: Any, frozen: Any, batch: Any) -> Any:
      with nn.logical_axis_rules(sharding.activation_rules()):
        params = state.join(trainable, frozen)
        _, found = step.loss_and_counts(module, params, batch, config.train.loss_chunk)
      return {name: found[name] for name in ("loss", "right", "count")}

    self._sums = jax.jit(sums)

  def due(self, number: int) -> bool:
    """Returns whether the validation split is scored after step `number`."""
    every = self._train.validate_every
    return bool(every) and (number % every == 0 or number == self._train.steps)

  def __call__(
    self, train_state: state.TrainState, stopped: Callable[[], bool] = lambda: False
  ) -> dict[str, float]:
    """Returns `val_loss` and `val_token_accuracy`, means over the supervised tokens of all batches.

    `stopped()` is asked while data are waited for; once it is true, {} is returned.
    """
    assert self._iterator is not None
    self._iterator.set_state(self._start)
    self._iterator.stopped = stopped
    total: dict[str, float] = {"loss": 0.0, "right": 0.0, "count": 0.0}
    for _ in range(self._count):
      try:
        batch = next(self._iterator)
      except prefetch.Stopped:
        return {}
      batch.pop(rows.SAMPLES)
      batch = mesh.put_batch(batch, self._mesh)
      found = self._sums(train_state.trainable, train_state.frozen, batch)
      total = {name: total[name] + float(found[name]) for name in total}
    count = max(total["count"], 1.0)
    return {"val_loss": total["loss"] / count, "val_token_accuracy": total["right"] / count}
