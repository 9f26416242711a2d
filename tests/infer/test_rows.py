"""Which rows a group of prompts fills, and what of the state it writes."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax.infer import decode, prefill, row_settings
from llava_sp_jax.infer.decode import Sampling, StopRule
from llava_sp_jax.infer.layout import EngineLayout
from llava_sp_jax.infer.rows import FILLED, Rows
from llava_sp_jax.models import cache as cache_lib
from llava_sp_jax.models.cache import New

RULE = StopRule((2,), 4, 16)


def rows(parts: int, count: int) -> Rows:
  programs: Any = SimpleNamespace(parts=parts)
  nothing: Any = None
  return Rows(programs, RULE, nothing, EngineLayout(), nothing, count)


@pytest.mark.parametrize("parts", [1, 4])
def test_a_group_is_prefilled_where_its_rows_are(parts: int) -> None:
  found = rows(parts, 64)
  drawn = random.Random(0)
  for _ in range(200):
    free = sorted(drawn.sample(range(64), drawn.randint(1, 64)))
    dealt = found.deal(free)
    assert dealt, "there is always progress"
    assert len(set(dealt)) == len(dealt)
    assert set(dealt) <= set(free)
    for count in (1, len(dealt) // 2 or 1, len(dealt)):  # fewer prompts may be left
      order, target = found._placed(dealt[:count])
      each = len(target) // parts
      assert len(order) == len(target)
      assert len(target) in found.groups
      written = [(i, row) for i, row in zip(order, target, strict=True) if row < 64]
      assert sorted(written) == list(enumerate(dealt[:count]))
      own = [(place // each, row // (64 // parts)) for place, row in enumerate(target) if row < 64]
      assert all(device == owner for device, owner in own)
    waiting = found.deal(free, wait=True)
    assert waiting in (dealt, [])
    patient = len(free) < 32 and len(dealt) < FILLED * len(target)
    assert (waiting == dealt) != patient


def test_one_part_takes_the_largest_group_that_is_free() -> None:
  found = rows(1, 64)
  assert found.groups == [1, 4, 16, 64]
  for count, group in ((1, 1), (3, 1), (4, 4), (15, 4), (17, 16), (63, 16), (64, 64)):
    free = list(range(64 - count, 64))
    assert found.deal(free) == free[:group]


def test_parts_with_fewer_free_rows_leave_places_empty() -> None:
  found = rows(4, 64)
  free = [*range(0, 2), *range(16, 22), *range(32, 35), *range(48, 53)]  # 2, 6, 3 and 5
  dealt = found.deal(free)
  assert sorted(dealt) == [0, 1, *range(16, 20), 32, 33, 34, *range(48, 52)]  # 13 of 16
  assert dealt[:4] == [0, 16, 32, 48]
  for few, group in (([20, 21, 52], [20, 52]), (range(16, 32), range(16, 32)), ([], [])):
    assert found.deal(few) == list(group)  # what a client waits for, in as few programs as can be
    assert found.deal(few, wait=True) == []
  half = list(range(32))  # all of two parts
  assert found.deal(half, wait=True) == found.deal(half)
  assert found.deal(half[1:], wait=True) == []


def test_a_group_writes_its_rows_and_no_others() -> None:
  """Part 1 of two, with rows 4 to 7: one prompt is its own, one is another part's, one padding."""
  strategy = Sampling(RULE)
  cache = cache_lib.allocate(1, 4, 6, 1, 2, jnp.float32, stacked=False)
  cache = cache._replace(
    keys=(cache.keys[0] - 1,), values=(cache.values[0] - 1,), length=cache.length + 9
  )
  state = decode.State(cache, strategy.empty(4))
  settings = row_settings.empty(3, RULE.logits, 4)
  logits = jnp.eye(3, RULE.logits)
  first = strategy.first(logits, jax.tree.map(jnp.asarray, settings))

  def positions(count: int, value: float) -> New:
    index = jnp.arange(3.0)[:, None, None, None] + value
    keys = jnp.broadcast_to(index, (3, 1, 2, count))
    return New((keys,), (keys.swapaxes(2, 3),))

  found = prefill._write(
    1,
    jnp.int32(1),
    state,
    first,
    positions(2, 10),
    positions(1, 20),
    jnp.asarray([2, 2, 1]),
    jnp.asarray([1, 1, 1]),
    jnp.asarray([3, 8, 6]),
  )
  wanted = np.full((4, 6), -1.0)
  wanted[2, :2] = [12, 22]  # start 1: the second position of the prefix is padding
  np.testing.assert_array_equal(found.cache.keys[0][:, 0, 0], wanted)
  np.testing.assert_array_equal(found.cache.values[0][:, 0, :, 1], wanted)
  assert found.cache.length.tolist() == [9, 9, 2, 9]
  assert found.rows.token.tolist() == [0, 0, 2, 0]
  assert found.rows.done.tolist() == [True, True, False, True]
