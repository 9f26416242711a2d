"""Skips updates with a non-finite loss or gradient and aborts after too many in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llava_sp_jax.errors import LlavaSPError
from llava_sp_jax.training.state import TrainState


class NonFiniteError(LlavaSPError, RuntimeError):
  """Raised after too many steps in a row with a non-finite loss or gradient."""


def keep_finite(
  old: TrainState, new: TrainState, loss: jax.Array, grad_norm: jax.Array
) -> tuple[TrainState, jax.Array]:
  """Returns (`new`, 0.0), or, if the loss or the gradient norm is not finite, `old` and 1.0.

  In the second case the state keeps the step counter of `new`. The choice is made for each array on
  the device, where it fuses with the update, so the host need not wait for the result.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

  def choose(ours: Any, theirs: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), ours, theirs)

  kept = new.replace(
    trainable=choose(new.trainable, old.trainable), opt_state=choose(new.opt_state, old.opt_state)
  )
  return kept, 1.0 - finite.astype(jnp.float32)


class Guard:
  """Counts the skipped steps of a run on the host, and aborts after `limit` of them in a row.

  It reads each flag one step late, so that the device always has work. All processes see the same
  metrics, so all abort at the same step. `report(step)` is called for each skipped step. `count` is
  the number of steps that were skipped before a resume.
  """

  def __init__(self, limit: int, report: Callable[[int], None], count: int = 0):
    self.count, self._row, self._limit, self._report = count, 0, limit, report
    self._waiting: tuple[int, jax.Array] | None = None

  def step(self, number: int, metrics: dict[str, jax.Array]) -> None:
    """Takes the metrics of step `number`, and reads the flag of the step before.

    Raises: NonFiniteError after `limit` skipped steps in a row.
    """
    self._look()
    self._waiting = (number, metrics["nonfinite"])

  def settle(self) -> None:
    """Reads the flag of the last step now; called before its metrics are logged or saved.

    Raises: NonFiniteError after `limit` skipped steps in a row.
    """
    self._look()

  def _look(self) -> None:
    if self._waiting is None:
      return
    number, flag = self._waiting
    self._waiting = None
    if not float(flag):
      self._row = 0
      return
    self.count, self._row = self.count + 1, self._row + 1
    self._report(number)
    if self._row >= self._limit:
      raise NonFiniteError(
        f"steps {number - self._row + 1} to {number}: loss or gradient was not finite {self._row} "
        "times in a row (train.max_nonfinite); nothing of them was learned. Lower the learning "
        "rate or look at their samples (ledger/), and start again: the run resumes from its last "
        "checkpoint"
      )
