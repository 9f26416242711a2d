"""Pairs of functions that turn a torch array into ours and back, numpy views where possible."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Layout:
  """`to_jax(to_torch(x)) == x` for every x of the right rank."""

  to_jax: Callable[[Array], Array]
  to_torch: Callable[[Array], Array]


same = Layout(lambda x: x, lambda x: x)
linear = Layout(lambda x: x.T, lambda x: x.T)  # [out, in] <-> [in, out]
conv = Layout(  # [out, in, h, w] <-> [h, w, in, out]
  lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)


def _flat_to_conv(x: Array, channels: int) -> Array:
  side = round((x.shape[0] // channels) ** 0.5)
  return x.reshape(side, side, channels, x.shape[1]).transpose(3, 2, 0, 1)


def whole_view(channels: int) -> Layout:
  """A convolution whose kernel covers its view: [out, in, h, w] <-> [h*w*in, out]."""
  return Layout(
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    lambda x: _flat_to_conv(x, channels),
  )
