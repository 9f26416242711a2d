"""The step is compiled once for each shape of batch, and the clock knows when."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llava_sp_jax.training import goodput, programs


def test_each_shape_is_compiled_once() -> None:
  seen: list[tuple[int, ...]] = []

  def step(state: jax.Array, batch: Any, rng: jax.Array) -> Any:
    seen.append(batch["tokens"].shape)
    return state + batch["tokens"].sum() + rng, {"loss": state}

  clock = goodput.Clock()
  clock.enter("step")
  run = programs.Programs(jax.jit(step, donate_argnums=0), clock)
  state, rng = jnp.zeros(()), jnp.ones(())
  for rows in (2, 3, 2, 3, 2):
    state, metrics = run(state, {"tokens": jnp.ones((rows, 4)), "slots": jnp.ones(rows)}, rng)
  assert seen == [(2, 4), (3, 4)]
  assert (float(state), float(metrics["loss"])) == (53.0, 44.0)
  assert clock.starts()[0].seconds["compile"] > 0


def test_a_program_that_is_known_is_not_compiled() -> None:
  class Never:
    def lower(self, *_: Any) -> Any:
      raise AssertionError

  batch = {"b": jnp.ones((2, 3)), "a": jnp.ones(4)}
  key = (("a", (4,)), ("b", (2, 3)))
  run = programs.Programs(Never(), goodput.Clock(), {key: lambda *given: given})
  assert run(1, batch, 2) == (1, batch, 2)
