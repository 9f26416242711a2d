"""Defines the array type of annotations: jax.Array, or on a call from the host also np.ndarray."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import jax
import numpy as np

# What the functions return to mypy is jax's, whatever they were given.
if TYPE_CHECKING:
  from jax import Array
else:
  Array = jax.Array | np.ndarray

__all__ = ["Array"]

# What jax takes for a dtype: np.dtype, a scalar class such as jnp.bfloat16, or a name. jax's own
# DTypeLike holds Any.
DType: TypeAlias = np.dtype[np.generic] | type[object] | str
