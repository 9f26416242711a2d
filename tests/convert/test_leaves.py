"""Leaves are found, stacked, sliced and refused by name and shape, before a value is read."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax.convert import layout, leaves, tables
from llava_sp_jax.convert.torch_io import FormatError, Tensor

NORM = "model.layers.{}.input_layernorm.weight"
QUERY = "model.layers.{}.self_attn.q_proj.weight"


def tensor(name: str, array: np.ndarray, reads: list[str] | None = None) -> Tensor:
  def read() -> np.ndarray:
    if reads is not None:
      reads.append(name)
    return array

  return Tensor(name, "file.bin", array.shape, array.dtype, read)


def gather(*tensors: Tensor) -> tuple[leaves.Leaves, list[str]]:
  problems: list[str] = []
  return leaves.gather(tensors, tables.LLAMA, problems), problems


def test_layers_are_stacked_in_order() -> None:
  order = (10, 2, *range(2), *range(3, 10))
  found, problems = gather(*(tensor(NORM.format(i), np.full(2, i, np.float32)) for i in order))
  assert not problems
  stacked = found["language_model/layers/attn_norm/scale"]
  assert stacked.shape == (11, 2)
  np.testing.assert_array_equal(stacked.read()[:, 0], np.arange(11))


def test_a_slice_is_the_slice_and_reads_its_layers_only() -> None:
  rng, reads = np.random.default_rng(0), list[str]()
  arrays = rng.normal(size=(4, 6, 5)).astype(np.float32)
  found, _ = gather(*(tensor(QUERY.format(i), a, reads) for i, a in enumerate(arrays)))
  leaf = found["language_model/layers/q_proj/kernel"]
  whole = leaf.read()
  np.testing.assert_array_equal(whole, arrays.transpose(0, 2, 1))
  reads.clear()
  index = (slice(1, 3), slice(None), slice(2, 5))
  np.testing.assert_array_equal(leaf.read(index), whole[index])
  assert reads == [QUERY.format(1), QUERY.format(2)]


def test_all_unknown_names_gaps_and_odd_layers_are_listed() -> None:
  zeros = np.zeros(2, np.float32)
  _, problems = gather(
    tensor(NORM.format(0), zeros),
    tensor(NORM.format(3), zeros),
    tensor("model.extra", np.zeros((4, 5))),
    tensor("other.weight", np.zeros(1)),
    tensor(QUERY.format(0), np.zeros((2, 2))),
    tensor(QUERY.format(1), np.zeros((2, 3))),
  )
  assert problems == [
    "unexpected tensor model.extra (4, 5) in file.bin",
    "unexpected tensor other.weight (1,) in file.bin",
    "language_model/layers/attn_norm/scale: layers [1, 2] are missing",
    "model.layers.1.self_attn.q_proj.weight: float64 (2, 3), but "
    "model.layers.0.self_attn.q_proj.weight is float64 (2, 2)",
  ]


def test_missing_unexpected_and_misshaped_are_listed_together() -> None:
  shape = jax.ShapeDtypeStruct
  expected = {"a": shape((2,), "f4"), "b": shape((3,), "f4"), "c": shape((2, 2), "f4")}
  arrays = {"a": np.zeros(2), "c": np.zeros((2, 3)), "d": np.zeros(1)}
  problems: list[str] = []
  leaves.fit(leaves.in_memory(arrays), expected, problems)
  assert problems == [
    "missing b (3,)",
    "unexpected d (1,) (d)",
    "c: expected shape (2, 2), found (2, 3) (c)",
  ]
  with pytest.raises(FormatError) as error:
    leaves.refuse("x", problems)
  assert str(error.value).splitlines()[0] == "x does not fit the model, nothing was converted:"
  assert len(str(error.value).splitlines()) == 4


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_that_are_not_finite_are_named(bad: float, dtype: str) -> None:
  array = np.zeros((3, 2), np.dtype(jax.numpy.dtype(dtype)))
  array[2, 1] = bad
  found, _ = gather(tensor("lm_head.weight", array))
  with pytest.raises(FormatError, match=r"file.bin: lm_head.weight: 1 of 6 values are NaN or inf"):
    found["language_model/lm_head/kernel"].read()


def test_back_to_torch_is_the_way_there_reversed() -> None:
  rng = np.random.default_rng(0)
  given = [tensor(QUERY.format(i), rng.normal(size=(6, 5)).astype(np.float32)) for i in range(3)]
  given.append(tensor("lm_head.weight", rng.normal(size=(7, 5)).astype(np.float32)))
  found, _ = gather(*given)
  back = {t.name: t for t in leaves.to_tensors(found, tables.LLAMA)}
  assert set(back) == {t.name for t in given}
  for one in given:
    assert back[one.name].shape == one.shape
    np.testing.assert_array_equal(back[one.name].array(), one.array())


def test_a_leaf_without_a_torch_name_is_named(tmp_path: Path) -> None:
  with pytest.raises(KeyError, match="no torch name for language_model/other"):
    leaves.to_tensors(leaves.in_memory({"language_model/other": np.zeros(2)}), tables.LLAMA)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
  ("shape", "axes"),
  [((700, 900), (1, 0)), ((300, 5, 7, 260), (2, 3, 1, 0)), ((257, 1024, 3), (2, 1, 0)),
   ((64, 9000), (0, 1)), ((0, 3), (1, 0)), ((), ())],
)  # fmt: skip
def test_copies_in_squares_are_copies(
  shape: tuple[int, ...], axes: tuple[int, ...], dtype: str
) -> None:
  x = np.random.default_rng(0).normal(size=shape).astype(np.dtype(jnp.dtype(dtype)))
  view = x.transpose(axes)
  found = layout.contiguous(view)
  assert found.flags.c_contiguous
  assert not np.shares_memory(found, x)
  assert found.tobytes() == view.tobytes()
