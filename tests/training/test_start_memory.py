"""What a start holds in the memory of the devices while weights are loaded from half precision."""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import initial, own_folders
from llava_sp_jax.convert.leaves import in_memory
from llava_sp_jax.distributed import mesh as mesh_lib
from llava_sp_jax.training import setup
from tests.conftest import ConfigMaker

WATCHED = ("initial_state", "initial_params", "split", "start")


def held() -> int:
  """Bytes of all buffers of the devices, each counted once."""
  buffers = {
    shard.data.unsafe_buffer_pointer(): shard.data.nbytes
    for array in jax.live_arrays()
    for shard in array.addressable_shards
  }
  return sum(buffers.values())


def test_a_start_holds_little_more_than_the_state(
  tiny_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The base is float16 in its files and bfloat16 in the state; each array is in both alone."""
  sizes = {"width": 64, "heads": 4, "kv_heads": 4, "head_dim": 16, "mlp_width": 128, "layers": 4}
  config = tiny_config(
    "finetune",
    model={"language_model": sizes, "lora": {"rank": 2}, "frozen_dtype": "bfloat16"},
    mesh={"base": "replicate"},
  )

  def files(config: config_lib.Config, expected: dict[str, Any]) -> Any:
    base = {
      path: np.full(s.shape, 0.01, np.float16)
      for path, s in expected.items()
      if not path.startswith("projector/") and "lora_" not in path
    }
    return in_memory(base)

  monkeypatch.setattr(initial, "open_init", files)
  before, most = held(), 0

  def watch(frame: Any, event: str, argument: Any) -> Any:
    nonlocal most
    if frame.f_code.co_name not in WATCHED:
      return None
    most = max(most, held() - before)
    return watch

  device_mesh = mesh_lib.create(config.mesh, devices=jax.devices()[:1])
  sys.settrace(watch)
  try:
    state, _, _ = setup.initial_state(config, device_mesh)
  finally:
    sys.settrace(None)
  size = held() - before
  assert sum(x.nbytes for x in state.frozen.values()) > 0.2 * size
  assert {x.dtype.name for x in state.frozen.values()} == {"bfloat16"}
  assert size <= most < 1.3 * size


def test_random_values_do_not_depend_on_devices(tiny_config: ConfigMaker) -> None:
  config = tiny_config("finetune")
  wanted = own_folders.abstract_leaves(config.model)
  alone = own_folders.random_leaves(config, wanted)
  state, _, _ = setup.initial_state(config, mesh_lib.create(config.mesh, 8))
  for path, values in state.trainable.items():
    np.testing.assert_array_equal(np.asarray(values), np.asarray(alone[path], values.dtype))
