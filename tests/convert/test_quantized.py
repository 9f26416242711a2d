"""Slices of quantised leaves are slices of the whole, and only what they need is read."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from llava_sp_jax.convert import quantized
from llava_sp_jax.convert.leaves import Index, InMemory, Leaf
from llava_sp_jax.models.quantize import FORMATS, leaf_shapes

PATH = "language_model/layers/q_proj/kernel"
VALUES = np.random.default_rng(0).normal(size=(3, 256, 10)).astype(np.float16)
REAL = {name: form for name, form in FORMATS.items() if form}


@dataclasses.dataclass(frozen=True)
class Watched(InMemory):
  """Writes down what is read."""

  seen: list[tuple[int, ...]]

  def read(self, index: Index | None = None) -> np.ndarray:
    values = super().read(index)
    self.seen.append(values.shape)
    return values


@pytest.fixture
def kernel() -> Watched:
  return Watched(PATH, VALUES.shape, VALUES.dtype, VALUES, [])


def leaves_of(kernel: Leaf, name: str) -> dict[str, Leaf]:
  shapes = leaf_shapes(REAL[name], VALUES.shape)
  expected = {f"{PATH}_{n.removeprefix('kernel_')}": s for n, s in shapes.items()}
  other = InMemory("x/scale", (2,), np.dtype("f"), np.ones(2, "f"))
  found = quantized.quantize({PATH: kernel, "x/scale": other}, expected, REAL[name])
  assert found.keys() == {*expected, "x/scale"}
  assert found.pop("x/scale") is other
  return found


@pytest.mark.parametrize("name", REAL)
def test_a_slice_is_a_slice_of_the_whole(kernel: Watched, name: str) -> None:
  want = [REAL[name].quantize(layer) for layer in VALUES]
  for path, leaf in leaves_of(kernel, name).items():
    whole = leaf.read()
    np.testing.assert_array_equal(whole, np.stack([w[path.rsplit("/", 1)[1]] for w in want]))
    assert (whole.shape, whole.dtype) == (leaf.shape, leaf.dtype)
    rows = leaf.shape[1]
    for cut in (slice(0, -(-rows // 2)), slice(rows // 4, rows), slice(rows - 1, rows)):
      index = (slice(1, 3), cut, slice(2, 7))
      np.testing.assert_array_equal(leaf.read(index), whole[index], err_msg=f"{path} {index}")


def test_a_layer_at_a_time_and_whole_blocks_of_wanted_columns(kernel: Watched) -> None:
  codes = leaves_of(kernel, "nf4")[PATH + "_q"]
  codes.read((slice(0, 2), slice(32, 64), slice(4, 6)))  # rows 64 to 127 of the kernel
  assert kernel.seen == [(1, 64, 2)] * 2
  kernel.seen.clear()
  found = leaves_of(kernel, "int8")
  for leaf in found.values():  # codes and scales are of one reading
    leaf.read()
  assert kernel.seen == [(1, 256, 10)] * 3


@pytest.mark.parametrize("name", REAL)
def test_back_to_floats(kernel: Watched, name: str) -> None:
  back = quantized.dequantize(leaves_of(kernel, name), REAL[name], "bfloat16")
  assert back.keys() == {PATH}
  leaf = back[PATH]
  assert (leaf.shape, str(leaf.dtype)) == (VALUES.shape, "bfloat16")
  want = np.stack([REAL[name].dequantize(REAL[name].quantize(x), leaf.dtype) for x in VALUES])
  np.testing.assert_array_equal(leaf.read(), want)
  index = (slice(1, 2), slice(60, 70), slice(0, 3))
  np.testing.assert_array_equal(leaf.read(index), want[index])
