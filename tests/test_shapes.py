"""Annotations of shapes and dtypes are checked in tests, and only there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import jaxtyping
import pytest

from llava_sp_jax.models.llava import merge
from llava_sp_jax.models.spatial import pool
from llava_sp_jax.training import loss
from tests.conftest import REPOSITORY

ROWS = jnp.zeros((2, 3, 4))


def head(parameters: dict[str, Any], hidden: Any) -> Any:
  return hidden


def sums(targets: Any, weights: Any) -> Any:
  return loss.sums(head, 8, {}, {}, ROWS, targets, weights, jnp.zeros((2, 3)))


IDS, WEIGHTS = jnp.zeros((2, 3), jnp.int32), jnp.ones((2, 3))
CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
  "merge: slots of another length": (merge, (ROWS, ROWS, IDS[:, :2])),
  "merge: floating slots": (merge, (ROWS, ROWS, WEIGHTS)),
  "pool: a grid that is not square": (pool, (jnp.zeros((1, 6, 4, 3)), 2)),
  "pool: integers": (pool, (jnp.zeros((1, 6, 6, 3), jnp.int32), 2)),
  "sums: targets of other rows": (sums, (IDS[:1], WEIGHTS)),
  "sums: integer weights": (sums, (IDS, IDS)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_shape_or_dtype_raises(name: str) -> None:
  function, arguments = CALLS[name]
  with pytest.raises(jaxtyping.TypeCheckError):
    function(*arguments)


def test_the_right_ones_do_not() -> None:
  assert merge(ROWS, ROWS, IDS).shape == ROWS.shape
  assert pool(jnp.zeros((1, 6, 6, 3)), 2).shape == (1, 2, 2, 3)
  assert sums(IDS, WEIGHTS).shape == (3,)


def test_outside_tests_nothing_is_checked() -> None:
  """No checker is loaded, nor jaxtyping itself by what is light; a wrong dtype passes."""
  code = (
    "import sys, llava_sp_jax, llava_sp_jax.config, llava_sp_jax.cli\n"
    "print('jaxtyping' in sys.modules)\n"
    "import jax.numpy as jnp\n"
    "from llava_sp_jax.models.llava import merge\n"
    "rows = jnp.zeros((2, 3, 4), jnp.int32)\n"
    "print(merge(rows, rows, rows[..., 0]).dtype, 'beartype' in sys.modules)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True
  )
  assert done.stdout.split() == ["False", "int32", "False"]
