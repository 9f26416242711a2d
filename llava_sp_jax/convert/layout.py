"""Changes torch's array layouts to jax's and back, by numpy views where possible."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Array = np.ndarray
BLOCK = 256  # side of the squares that are copied at once


@dataclasses.dataclass(frozen=True)
class TensorLayout:
  """Holds the functions between the layouts of torch and jax; each is the inverse of the other."""

  to_jax: Callable[[Array], Array]
  to_torch: Callable[[Array], Array]


same = TensorLayout(lambda x: x, lambda x: x)
linear = TensorLayout(lambda x: x.T, lambda x: x.T)  # [out, in] <-> [in, out]
conv = TensorLayout(  # [out, in, h, w] <-> [h, w, in, out]
  lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)
)


def contiguous(x: Array) -> Array:
  """Returns a copy of an array in C order.

  numpy's own copy of a transposed matrix misses the cache at every element. So if the fastest axis
  changes, large arrays are copied in squares that fit the cache. Anything but a numpy array (a
  tracer that only asks for shapes) is returned as it is.
  """
  if not isinstance(x, np.ndarray):
    return x
  fast = min(range(x.ndim), key=lambda axis: (x.strides[axis], -axis), default=0)
  if x.flags.c_contiguous or fast == x.ndim - 1 or x.nbytes < 1 << 20:
    return np.array(x, order="C")
  out = np.empty(x.shape, x.dtype)
  sides = [BLOCK if axis in (fast, x.ndim - 1) else n for axis, n in enumerate(x.shape)]
  others = [axis for axis in range(x.ndim - 1) if axis != fast]
  for axis in others:  # so that each block has about BLOCK**2 elements
    sides[axis] = max(1, BLOCK**2 // (min(BLOCK, x.shape[fast]) * min(BLOCK, x.shape[-1])))
  starts = [range(0, n, side) for n, side in zip(x.shape, sides, strict=True)]

  def strip(start: int) -> None:
    for corner in itertools.product(*starts[:-1]):
      block = tuple(slice(i, i + n) for i, n in zip((*corner, start), sides, strict=True))
      out[block] = x[block]

  with ThreadPoolExecutor(os.cpu_count()) as threads:
    list(threads.map(strip, starts[-1]))
  return out


def _flat_to_conv(x: Array, channels: int) -> Array:
  side = round((x.shape[0] // channels) ** 0.5)
  return x.reshape(side, side, channels, x.shape[1]).transpose(3, 2, 0, 1)


def whole_view(channels: int) -> TensorLayout:
  """Returns the layout of a convolution whose kernel covers its view.

  [out, in, h, w] <-> [h*w*in, out], where in is `channels`.
  """
  return TensorLayout(
    lambda x: contiguous(x.transpose(2, 3, 1, 0).reshape(-1, channels, x.shape[0])).reshape(
      -1, x.shape[0]
    ),
    lambda x: _flat_to_conv(x, channels),
  )
