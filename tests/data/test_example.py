"""Rows: where image tokens go, what is cut off, and what positions and segments branches have."""

from __future__ import annotations

import numpy as np
import pytest

from llava_sp_jax.data.example import BRANCHES, IMAGE_ID, Run, from_labels, layout, one_tile
from llava_sp_jax.data.failure import SampleError


def test_an_image_takes_its_slots_in_order() -> None:
  runs = [Run((7, IMAGE_ID, 8, IMAGE_ID, 9), (False, False, True, False, True))]
  row = layout(runs, [one_tile(3)] * 2, row_length=12)
  assert row.slots.tolist() == [-1, 0, 1, 2, -1, 3, 4, 5, -1, -1, -1, -1]
  assert row.tokens.tolist() == [7, 0, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0]
  assert row.positions.tolist() == [*range(9), 0, 0, 0]
  assert row.segments.tolist() == [BRANCHES] * 9 + [0] * 3
  assert np.flatnonzero(row.weights).tolist() == [3, 7]  # the places before 8 and 9
  assert row.targets[[3, 7]].tolist() == [8, 9]
  assert row.length == 9


def test_branches_continue_the_trunk() -> None:
  runs = [
    Run((1, 2), (False, False)),
    Run((3, 4), (False, True), 1),
    Run((5,), (False,), 2),
    Run((6,), (True,), 2),
  ]
  row = layout(runs, [], 6)
  assert row.positions.tolist() == [0, 1, 2, 3, 2, 3]
  assert (row.segments - BRANCHES).tolist() == [0, 0, 1, 1, 2, 2]
  assert np.flatnonzero(row.weights).tolist() == [2, 4]


def test_what_is_too_long_is_cut_off_and_not_learned() -> None:
  runs = [Run(tuple(range(10, 20)), (True,) * 10)]
  row = layout(runs, [], 6)
  assert row.length == 6
  assert row.tokens.tolist() == [10, 11, 12, 13, 14, 15]
  assert row.weights.tolist() == [1, 1, 1, 1, 1, 0]  # the target of the last place is gone
  whole = layout(runs, [], 10)
  assert whole.weights.tolist() == [1] * 9 + [0]


def test_an_image_is_never_cut() -> None:
  runs = [Run((1, IMAGE_ID), (False, False))]
  assert layout(runs, [one_tile(5)], 6).slots.tolist() == [-1, 0, 1, 2, 3, 4]
  with pytest.raises(
    SampleError, match="an image of 5 tokens does not fit into rows of 5 behind 1 tokens"
  ):
    layout(runs, [one_tile(5)], 5)


@pytest.mark.parametrize("images", [0, 2])
def test_images_and_text_must_agree(images: int) -> None:
  message = f"the text has 1 <image> but the sample has {images} images"
  with pytest.raises(SampleError, match=message):
    layout([Run((1, IMAGE_ID), (False, False))], [one_tile(2)] * images, 9)


def test_runs_from_the_original_s_arrays() -> None:
  (run,) = from_labels([1, IMAGE_ID, 5, 6], [-100, -100, -100, 6])
  assert run.supervised == (False, False, False, True)
