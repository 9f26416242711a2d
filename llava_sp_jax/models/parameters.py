"""Defines the type of a model's parameters: dictionaries by names of modules, nested, of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  import jax
  import numpy as np

  Params = Mapping[str, "Params" | jax.Array | np.ndarray]
else:  # beartype resolves no alias within itself
  Params = Mapping
