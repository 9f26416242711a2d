"""The room of a server follows memory, its sizes are few, and collections of garbage stall nobody."""

from __future__ import annotations

import dataclasses
import gc
import time

import pytest

from llava_sp_jax.config import ConfigError
from llava_sp_jax.distributed import memory
from llava_sp_jax.infer.layout import EngineLayout
from llava_sp_jax.plan import traffic
from llava_sp_jax.serve import checkpoint
from llava_sp_jax.serve.limits import DEFAULT
from tests.conftest import ConfigMaker
from tests.serve import fake
from tests.serve.live import live

ROWS = 4


def test_rows_and_caches_fit_into_free_memory(tiny_config: ConfigMaker) -> None:
  config = tiny_config("finetune")
  longest = config.model.language_model.max_positions
  each = traffic.of(config.model).position * ROWS
  free = each * longest // 2
  found = checkpoint.sizes(config, DEFAULT, ROWS, 0, free)
  assert 0 < found.positions < longest
  assert found.positions * each + found.feature_bytes + found.prefix_bytes < free
  assert checkpoint.layout(config, DEFAULT, found).new_tokens == found.positions - 1
  assert checkpoint.sizes(config, DEFAULT, ROWS, 192, free).positions == 192
  assert checkpoint.layout(
    config, DEFAULT, checkpoint.sizes(config, DEFAULT, ROWS, 0, 1 << 40)
  ).positions == (longest)
  assert checkpoint.sizes(config, DEFAULT, ROWS, 0, None).positions == 0  # the model's


@pytest.mark.parametrize("positions", [0, 4096])
def test_too_little_memory_is_said_before_anything_is_made(
  tiny_config: ConfigMaker, positions: int
) -> None:
  config = tiny_config("finetune")
  free = traffic.of(config.model).position * ROWS * 100
  with pytest.raises(ConfigError, match="--max-positions, --cache int8 or --weights int8"):
    checkpoint.sizes(config, DEFAULT, ROWS, positions, free)


def test_larger_sizes_lie_further_apart() -> None:
  layout = EngineLayout(growing=True, positions=1000)
  lengths = range(1, 1001)
  found = sorted({layout.rounded(n, 16) for n in lengths})
  assert found[:12] == [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]
  assert (found[-1], len(found)) == (1008, 20)
  assert all(n <= layout.rounded(n, 16) <= max(n + 15, 1.25 * n) for n in lengths)
  assert layout.rounded(0, 16) == 0
  assert layout.rounded(1010, 16) == 1024, "a row never has less room than it needs"
  every = dataclasses.replace(layout, growing=False)
  assert [every.rounded(n, 64) for n in (1, 64, 65, 600)] == [64, 64, 128, 640]


def test_free_memory_of_this_machine() -> None:
  found = memory.free(1)
  assert found is None or 1 << 20 < found < 1 << 46
  assert "GB in use" in memory.described()


def test_a_collection_of_garbage_does_not_visit_the_model() -> None:
  """A full one stops every thread; the objects of JAX alone make it take more than 0.1 s."""
  held = [[[number]] for number in range(100_000)]
  gc.collect()
  since = time.process_time()
  gc.collect()
  whole = time.process_time() - since
  with live(fake.served(fake.FakeService())):
    since = time.process_time()
    gc.collect()
    assert time.process_time() - since < whole / 4
  gc.collect()
  assert gc.get_freeze_count() == 0, "a program that goes on collects all garbage again"
  assert len(held) == 100_000
