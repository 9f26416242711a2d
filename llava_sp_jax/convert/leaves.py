"""Holds arrays of the parameter tree that are still in files, and reads their tensors part by part.

Such an array is a leaf of the tree. All errors of names and shapes are found here, before a value
is read.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from llava_sp_jax.convert import tables
from llava_sp_jax.convert.layout import TensorLayout, contiguous
from llava_sp_jax.convert.torch_io import BFLOAT16, FormatError, Tensor

SHOWN = 40  # problems, or missing layers, that an error lists
Index = tuple[slice, ...]
Leaves = dict[str, "Leaf"]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """Holds an array of the parameter tree, wherever its values are; `read` returns them."""

  path: str
  shape: tuple[int, ...]
  dtype: np.dtype

  @property
  def nbytes(self) -> int:
    """Returns the size of the whole array in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize

  @property
  def origin(self) -> str:
    """Returns the name of the tensor or file that the array comes from, for messages."""
    return self.path

  def read(self, index: Index | None = None) -> np.ndarray:
    """Returns the values of the whole array, or those of `index`, a slice for each axis."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class InMemory(Leaf):
  """Holds an array of the parameter tree whose values are in memory."""

  values: np.ndarray

  def read(self, index: Index | None = None) -> np.ndarray:
    return self.values if index is None else self.values[index]


@dataclasses.dataclass(frozen=True)
class Cast(Leaf):
  """Rounds another array of the tree to a dtype when it is read."""

  inner: Leaf

  def read(self, index: Index | None = None) -> np.ndarray:
    return rounded(self.inner.read(index), self.dtype, self.path)


def rounded(values: np.ndarray, dtype: np.dtype, path: str) -> np.ndarray:
  """Casts values to `dtype`; `path` names the parameter in the message.

  Raises: FormatError when they are too large for float16.
  """
  if dtype != np.float16 or values.dtype == np.float16:
    return values.astype(dtype)
  largest = float(np.abs(values).max(initial=0))
  if largest >= 65520:  # rounds up to infinity
    raise FormatError(
      f"{path}: {largest:g} is too large for float16, which ends at 65504; take bfloat16 or float32"
    )
  return values.astype(dtype)


def in_memory(arrays: Mapping[str, np.ndarray]) -> Leaves:
  """Returns {path: leaf} with the values of `arrays`, {path: array}."""
  return {p: InMemory(p, a.shape, a.dtype, a) for p, a in arrays.items()}


@dataclasses.dataclass(frozen=True)
class InTensors(Leaf):
  """Reads a parameter from a torch tensor, or from one tensor for each layer."""

  tensors: tuple[Tensor, ...]
  layout: TensorLayout
  stacked: bool  # the first axis counts the layers

  @property
  def origin(self) -> str:
    more = f" and {len(self.tensors) - 1} more" if len(self.tensors) > 1 else ""
    return self.tensors[0].name + more

  def first_layers(self, count: int) -> InTensors:
    """Returns the parameter with its first `count` layers."""
    shape = (count, *self.shape[1:])
    return dataclasses.replace(self, shape=shape, tensors=self.tensors[:count])

  def read(self, index: Index | None = None) -> np.ndarray:
    """Returns the values at `index`, a slice for each axis; reads only the tensors of its layers.

    Raises: FormatError when a value is not finite.
    """
    index = index or (slice(None),) * len(self.shape)
    if not self.stacked:
      return self._one(self.tensors[0], index)
    tensors = self.tensors[index[0]]
    if len(tensors) == 1:
      return self._one(tensors[0], index[1:])[None]
    out = np.empty((len(tensors), *_sliced(self.shape[1:], index[1:])), self.dtype)
    for i, tensor in enumerate(tensors):
      out[i] = self._one(tensor, index[1:])
    return out

  def _one(self, tensor: Tensor, index: Index) -> np.ndarray:
    values = contiguous(self.layout.to_jax(tensor.array())[index])
    bad = _count_not_finite(values)
    if bad:
      raise FormatError(
        f"{tensor.origin}: {tensor.name}: {bad} of {values.size} values are NaN or infinite; "
        "the file is damaged or its training diverged"
      )
    return values


def _count_not_finite(values: np.ndarray) -> int:
  """Returns the number of NaN and infinite values.

  It works in pieces that fit the cache, and on the bits of bfloat16, because numpy is slow at both.
  """
  flat = values.reshape(-1)
  step, bad = 1 << 18, 0
  for piece in (flat[i : i + step] for i in range(0, flat.size, step)):
    if piece.dtype == BFLOAT16:  # not finite: all bits of the exponent are 1
      bad += int(np.count_nonzero(piece.view(np.uint16) & 0x7F80 == 0x7F80))
    else:
      bad += piece.size - int(np.count_nonzero(np.isfinite(piece)))
  return bad


def _sliced(shape: tuple[int, ...], index: Index) -> tuple[int, ...]:
  return tuple(len(range(*s.indices(n))) for n, s in zip(shape, index, strict=True))


def gather(
  tensors: Iterable[Tensor], rows: tuple[tables.NameRule, ...], problems: list[str]
) -> Leaves:
  """Finds the name rule of each tensor, and stacks the layers; returns {parameter path: leaf}.

  `rows` are the rules of a model's parts. Adds to `problems` every tensor without a rule, every
  missing layer, and layers that differ in shape or dtype.
  """
  found: dict[str, dict[int | None, tuple[Tensor, TensorLayout]]] = {}
  for tensor in tensors:
    if tables.ignored(tensor.name):
      continue
    match = tables.match(tensor.name, rows)
    if match is None:
      problems.append(f"unexpected tensor {tensor.name} {tensor.shape} in {tensor.origin}")
    else:
      parts = found.setdefault(match.path, {})
      if match.layer in parts:
        twice = parts[match.layer][0].name
        problems.append(f"two tensors are {match.path}: {twice} and {tensor.name}")
      parts[match.layer] = (tensor, match.layout)
  leaves: Leaves = {}
  for path, parts in found.items():
    leaf = _leaf(path, parts, problems)
    if leaf:
      leaves[path] = leaf
  return leaves


def _leaf(
  path: str, parts: Mapping[int | None, tuple[Tensor, TensorLayout]], problems: list[str]
) -> InTensors | None:
  (first, layout), *_ = parts.values()
  try:
    shape = shape_after(layout.to_jax, first.shape)
  except (TypeError, ValueError) as error:
    problems.append(f"{first.name}: shape {first.shape} does not fit its layout ({error})")
    return None
  if None in parts:
    return InTensors(path, shape, first.dtype, (first,), layout, stacked=False)
  numbers = sorted(n for n in parts if n is not None)
  gaps = list(itertools.islice((n for n in range(numbers[-1]) if n not in parts), SHOWN))
  if gaps:
    more = numbers[-1] + 1 - len(numbers) - len(gaps)
    problems.append(f"{path}: layers {gaps}{f' and {more:,} more' if more else ''} are missing")
    return None
  tensors = tuple(parts[n][0] for n in numbers)
  odd = [t for t in tensors if (t.shape, t.dtype) != (first.shape, first.dtype)]
  for tensor in odd:
    problems.append(
      f"{tensor.name}: {tensor.dtype} {tensor.shape}, but {first.name} is {first.dtype} "
      f"{first.shape}"
    )
  if odd:
    return None
  return InTensors(path, (len(tensors), *shape), first.dtype, tensors, layout, stacked=True)


@functools.lru_cache(maxsize=4096)
def shape_after(change: Callable[[Any], Any], shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape that a function of layouts makes of `shape`, without computing an array."""
  abstract = jax.ShapeDtypeStruct(shape, np.uint8)  # the dtype does not matter
  return tuple(jax.eval_shape(lambda x: change(x), abstract).shape)


def fit(leaves: Leaves, expected: Mapping[str, Any], problems: list[str]) -> None:
  """Compares leaves with `expected`, {path: shape}; adds a text to `problems` for each difference.

  Differences are parameters that are missing, unexpected or of another shape.
  """
  for path in sorted(set(expected) - set(leaves)):
    problems.append(f"missing {path} {expected[path].shape}")
  for path in sorted(set(leaves) - set(expected)):
    problems.append(f"unexpected {path} {leaves[path].shape} ({leaves[path].origin})")
  for path in sorted(set(leaves) & set(expected)):
    if leaves[path].shape != expected[path].shape:
      problems.append(
        f"{path}: expected shape {expected[path].shape}, found {leaves[path].shape} "
        f"({leaves[path].origin})"
      )


def refuse(origin: str, problems: list[str]) -> None:
  """Raises FormatError with all problems, if there are any; `origin` names the checkpoint."""
  if problems:
    raise FormatError(f"{origin} does not fit the model, nothing was converted:{listed(problems)}")


def listed(problems: list[str]) -> str:
  """Returns problems as the end of a message, each on its own line; a single one on the same line.

  Problems that differ only in the number of a layer become one line.
  """
  alike: dict[str, list[str]] = {}
  for problem in problems:
    alike.setdefault(re.sub(r"(?<=\blayers\.)\d+", "*", problem), []).append(problem)
  lines = [text if len(same) > 1 else same[0] for text, same in alike.items()]
  counts = [f" ({len(same)} layers)" if len(same) > 1 else "" for same in alike.values()]
  shown = [line + count for line, count in zip(lines, counts, strict=True)][:SHOWN]
  more = [f"and {len(lines) - SHOWN:,} more"] if len(lines) > SHOWN else []
  return f" {shown[0]}" if len(shown) == 1 else "".join(f"\n  {line}" for line in shown + more)


def to_tensors(leaves: Leaves, rows: tuple[tables.NameRule, ...]) -> list[Tensor]:
  """Returns the parameters under torch's names and in its layout, layer by layer, not yet read.

  Raises: KeyError for a parameter that no rule of `rows` names.
  """
  targets = tables.by_path(rows)
  unnamed = sorted(set(leaves) - set(targets))
  if unnamed:
    raise KeyError(f"no torch name for {', '.join(unnamed)}")
  result = []
  for path, target in targets.items():
    if path not in leaves:
      continue
    leaf, layered = leaves[path], "{layer}" in target.name
    inner = leaf.shape[1:] if layered else leaf.shape
    shape = shape_after(target.layout.to_torch, inner)
    for layer in range(leaf.shape[0]) if layered else (None,):
      name = target.name.replace("{layer}", str(layer))

      def array(leaf: Leaf = leaf, layer: int | None = layer, target: Any = target) -> np.ndarray:
        rest = (slice(None),) * (len(leaf.shape) - 1)
        ours = leaf.read() if layer is None else leaf.read((slice(layer, layer + 1), *rest))[0]
        there: np.ndarray = target.layout.to_torch(ours)
        return there

      result.append(Tensor(name, path, shape, leaf.dtype, array))
  return result
