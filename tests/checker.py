"""Checks annotations as PEP 484 reads them: an int is a float. numpy's arrays pass for jax's."""

from __future__ import annotations

import jax
import numpy as np
from beartype import BeartypeConf, FrozenDict, beartype

check = beartype(
  conf=BeartypeConf(
    is_pep484_tower=True,
    # Constants that jax hands on while it traces are numpy's, as what a host passes is.
    hint_overrides=FrozenDict({jax.Array: jax.Array | np.ndarray}),
  )
)
