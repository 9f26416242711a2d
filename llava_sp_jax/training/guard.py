"""Steps whose loss or gradient is not finite: skipped on the device, reported, and too many an end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from llava_sp_jax.errors import LlavaSPError
from llava_sp_jax.training.state import TrainState


class NonFiniteError(LlavaSPError, RuntimeError):
  """Too many steps in a row without a finite loss and gradient."""


def keep_finite(
  old: TrainState, new: TrainState, loss: jax.Array, grad_norm: jax.Array
) -> tuple[TrainState, jax.Array]:
  """(`new`, or `old` with `new`'s step counter when either number is not finite; 1.0 if so).

  The choice is made leaf by leaf on the device, where it fuses with the update; the host learns of
  it later and never waits for it.
  """
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

  def choose(ours: Any, theirs: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), ours, theirs)

  kept = new.replace(
    trainable=choose(new.trainable, old.trainable), opt_state=choose(new.opt_state, old.opt_state)
  )
  return kept, 1.0 - finite.astype(jnp.float32)


class Guard:
  """Counts skipped steps of a run on the host, one step late, so that the device always has work.

  Every process sees the same metrics and so comes to the same end. `report(step)` is called for
  each skipped step.
  """

  def __init__(self, limit: int, report: Callable[[int], None], count: int = 0):
    self.count, self._row, self._limit, self._report = count, 0, limit, report
    self._waiting: tuple[int, jax.Array] | None = None

  def step(self, number: int, metrics: dict[str, jax.Array]) -> None:
    """Step `number` is on its way; looks at the one before. Raises: NonFiniteError."""
    self._look()
    self._waiting = (number, metrics["nonfinite"])

  def settle(self) -> None:
    """Looks at the last step now: before its numbers are logged or saved. Raises: NonFiniteError."""
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
        "rate or look at their samples (ledger/), and start again: the run goes on from its last "
        "checkpoint"
      )
