"""How exact the reference's gradients are: both sides against our formulas in float64.

Usage: python -m tests.parity.float64 [case ...]

Prints, for each case, the largest difference (relative to a tensor's largest value) of the stored
torch gradients and of our float32 gradients to a float64 run. It is the reason for
`ladder.EXCEPTIONS`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_sp_jax.models import build
from llava_sp_jax.training import state, step
from tests.parity import cases


def gradients(case: cases.Case, dtype: str) -> dict[str, np.ndarray]:
  """Gradients of the batch's loss under the original's names, computed in `dtype`."""
  model = dataclasses.replace(case.model, dtype=dtype, frozen_dtype=dtype)
  module = build.model(model)
  config = cases.training_config(case, 0.0, 0.0)
  trainable, frozen = state.split(case.params, config)
  cast = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, dtype))
  trainable, frozen = cast(trainable), cast(frozen)
  batch = case.batch(case.inputs["batch"]["rows"])

  def loss_fn(trainable: Any, frozen: Any, batch: Any) -> jax.Array:
    return step.loss_and_counts(module, state.join(trainable, frozen), batch, chunk=500)[0]

  names = cases.learning_names(np.load(cases.GOLDEN / case.name / "grads.npz"))
  grads = jax.jit(jax.grad(loss_fn))(trainable, frozen, batch)
  return dict(case.torch_arrays(grads, names))


def differences(case: cases.Case) -> Iterator[tuple[str, float, float]]:
  """(name, of the stored torch gradient, of our float32 gradient), both to float64."""
  ours = gradients(case, "float32")
  with jax.enable_x64(True):
    # The model computes softmax, norms and loss in `jnp.float32` whatever its dtype.
    single, jnp.float32 = jnp.float32, jnp.float64
    try:
      exact = gradients(case, "float64")
    finally:
      jnp.float32 = single
  stored = np.load(cases.GOLDEN / case.name / "grads.npz")
  for name, truth in exact.items():
    assert truth.dtype == np.float64, name
    scale = np.abs(truth).max()
    full = f"grad/{name}" in stored
    torch = stored[f"grad/{name}" if full else f"probe/{name}"]
    same = truth if full else cases.probe(truth, 32)
    yield name, np.abs(torch - same).max() / scale, np.abs(ours[name] - truth).max() / scale


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("cases", nargs="*", default=list(cases.TRAINED))
  print(
    "| case | torch float32 to float64 | ours float32 to float64 | tensors |\n|---|---|---|---|"
  )
  for name in parser.parse_args().cases:
    rows = list(differences(cases.case(name)))
    print(
      f"| {name} | {max(r[1] for r in rows):.1e} | {max(r[2] for r in rows):.1e} | {len(rows)} |"
    )


if __name__ == "__main__":
  main()
