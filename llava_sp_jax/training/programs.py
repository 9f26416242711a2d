"""Compiles the step once for each shape of batch, and calls the compiled programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_sp_jax.distributed import processes
from llava_sp_jax.training.goodput import Clock

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of a batch, by name


def shapes(batch: Mapping[str, Any]) -> Shapes:
  """Returns the names and shapes of the arrays of a batch, in the order of their names."""
  return tuple((name, tuple(batch[name].shape)) for name in sorted(batch))


class Programs:
  """Calls the step, which is compiled when a batch has a shape that no batch had before.

  The time that this takes counts to `compile` of the clock.
  """

  def __init__(self, step: Any, clock: Clock, known: Mapping[Shapes, Any] | None = None):
    """Takes the jitted `step` of `setup.compile_step`; `known` has programs that are compiled."""
    self._step, self._clock, self._known = step, clock, dict(known or {})

  def __call__(self, state: Any, batch: Mapping[str, Any], rng: Any) -> Any:
    """Returns (state, metrics) of the step; every process must call it with the same shapes."""
    found = shapes(batch)
    if found not in self._known:
      with self._clock.of("compile"):
        self._known[found] = self._step.lower(state, batch, rng).compile()
        # No process may run the step before all have compiled it.
        processes.barrier(f"program {len(self._known)} of the step is compiled")
    return self._known[found](state, batch, rng)
