"""Names the array of annotations: jax's, or on a call from the host numpy's, which jax takes as well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import numpy as np

# What the functions return to mypy is jax's, whatever they were given.
if TYPE_CHECKING:
  from jax import Array
else:
  Array = jax.Array | np.ndarray

__all__ = ["Array"]
