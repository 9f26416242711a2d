"""Quantizes kernels while they are read from their files, and dequantizes them, layer by layer.

A process reads only the part of a kernel that its devices hold, widened to whole blocks. In memory
are the float values of one layer at a time, and the codes of one stacked kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llava_sp_jax.convert.leaves import Index, Leaf, Leaves
from llava_sp_jax.models.quantize import Format, is_quantized


class Pieces:
  """Caches the quantized slices of one kernel, because its codes and scales are read in turn."""

  def __init__(self) -> None:
    self._path = ""
    self._found: dict[str, dict[str, np.ndarray]] = {}

  def read(self, kernel: Leaf, form: Format, index: Index) -> dict[str, np.ndarray]:
    """Returns codes and scales of `kernel[index]` by name, stacked over its layers."""
    if kernel.path != self._path:
      self._path, self._found = kernel.path, {}
    if str(index) not in self._found:
      layers, rows, columns = index
      parts = [
        form.quantize(kernel.read((slice(i, i + 1), rows, columns))[0])
        for i in range(layers.start, layers.stop)
      ]
      self._found[str(index)] = {name: np.stack([p[name] for p in parts]) for name in parts[0]}
    return self._found[str(index)]


@dataclasses.dataclass(frozen=True)
class Quantized(Leaf):
  """Reads one array [L, N, O] of a quantized kernel, codes or scales; the kernel is [L, I, O]."""

  kernel: Leaf
  form: Format
  pieces: Pieces

  @property
  def origin(self) -> str:
    return self.kernel.origin

  def read(self, index: Index | None = None) -> np.ndarray:
    index = index or (slice(None),) * 3
    layers, rows, columns = (
      slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True)
    )
    inputs = self.kernel.shape[1]
    each = inputs // self.shape[1]  # rows of the kernel for each row of this leaf
    grain = inputs if self.form.whole else self.form.block
    low = rows.start * each // grain * grain
    high = -(-rows.stop * each // grain) * grain
    piece = self.pieces.read(self.kernel, self.form, (layers, slice(low, high), columns))
    first = low // each
    return piece[self.path.rsplit("/", 1)[1]][:, rows.start - first : rows.stop - first]


def quantize(leaves: Leaves, expected: Mapping[str, Any], form: Format | None) -> Leaves:
  """Replaces weight matrices by the codes and scales of their quantized form, computed when read.

  Args:
    leaves: parameters by path, as floats.
    expected: {path: shape} of the quantized model; says which ones are replaced.
    form: the format; None changes nothing.

  Both trees may lack parts of the model.
  """
  if form is None:
    return leaves
  pieces, result, kernels = Pieces(), dict(leaves), set()
  for path, shape in expected.items():
    kernel = path.rsplit("/", 1)[0] + "/kernel"
    if is_quantized(path) and kernel in leaves:
      kernels.add(kernel)
      result[path] = Quantized(
        path, shape.shape, np.dtype(shape.dtype), leaves[kernel], form, pieces
      )
  return {path: leaf for path, leaf in result.items() if path not in kernels}


@dataclasses.dataclass(frozen=True)
class Dequantized(Leaf):
  """Reads the float kernel [L, I, O] of a quantized one, rounded to `dtype`."""

  leaves: Leaves  # by their last names
  form: Format

  def read(self, index: Index | None = None) -> np.ndarray:
    layers, rows, columns = index or (slice(None),) * 3
    whole = slice(None)
    found = []
    for i in range(*layers.indices(self.shape[0])):
      layer = {n: x.read((slice(i, i + 1), whole, whole))[0] for n, x in self.leaves.items()}
      found.append(self.form.dequantize(layer, self.dtype)[rows, columns])
    return np.stack(found)


def dequantize(leaves: Leaves, form: Format | None, dtype: str) -> Leaves:
  """Returns float kernels of `dtype` instead of quantized ones, as `form` defines them.

  The values are those that the quantized model computes with. `form` None changes nothing.
  """
  if form is None:
    return leaves
  stems: dict[str, Leaves] = {}
  for path, leaf in leaves.items():
    if is_quantized(path):
      stem, name = path.rsplit("/", 1)
      stems.setdefault(stem, {})[name] = leaf
  kernels: Leaves = {}
  for stem, parts in stems.items():
    layers, rows, columns = parts["kernel_q"].shape
    shape = (layers, rows * form.packed, columns)
    wanted = np.dtype(jnp.dtype(dtype))
    kernels[f"{stem}/kernel"] = Dequantized(f"{stem}/kernel", shape, wanted, parts, form)
  return {**{p: leaf for p, leaf in leaves.items() if not is_quantized(p)}, **kernels}
