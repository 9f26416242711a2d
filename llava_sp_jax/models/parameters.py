"""Defines the type of a model's parameters: dictionaries by names of modules, nested, of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias, Union

import jax
import numpy as np

# Where its name is imported, `typing.get_type_hints` resolves the alias within itself.
Params: TypeAlias = Mapping[str, Union["Params", jax.Array, np.ndarray]]
