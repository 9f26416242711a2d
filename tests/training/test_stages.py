"""Full fine-tuning and QLoRA as stages: what moves, what stays, on one device and on eight."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.checkpoints import fingerprints, initial, opening, own_folders, runs
from llava_sp_jax.convert import export, formats
from llava_sp_jax.models.quantize import is_quantized
from llava_sp_jax.training import loop, optimizer, setup
from tests.conftest import WIDE, ConfigMaker, merged
from tests.distributed.meshes import MESHES, mesh_of, run

FULL = {"model": {"lora": {"rank": 0}}, "optimizer": {"weight_decay": 0.1}}


def qlora(tiny_config: ConfigMaker, form: str, **changes: Any) -> config_lib.Config:
  values = {"model": {**WIDE, "quantize": form}, "optimizer": {"learning_rate": 3e-3}}
  return tiny_config("finetune", "none", **merged(values, changes))


@pytest.mark.parametrize(
  "form",
  [
    pytest.param("int8", marks=pytest.mark.slow),
    pytest.param("nf4", marks=pytest.mark.guard),
    pytest.param("nf4_double", marks=pytest.mark.slow),
  ],
)
def test_qlora_learns_on_any_mesh_and_its_base_stays(tiny_config: ConfigMaker, form: str) -> None:
  config = qlora(tiny_config, form, train={"steps": 5})
  losses, state = run(config, mesh_of(MESHES["one"]))
  assert losses[-1] < losses[0] - 0.1
  codes = {p: x for p, x in state.frozen.items() if is_quantized(p)}
  assert {p.split("/")[2] for p in codes} == {
    f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")
  }
  everything = {**state.frozen, **state.trainable}
  assert not [p for p in everything if re.match(r"language_model/.*_proj/kernel$", p)]
  assert {str(x.dtype) for p, x in codes.items() if p.endswith("kernel_q")} <= {"int8", "uint8"}
  before = initial.initial_params(config)["language_model"]["layers"]
  for path, leaf in codes.items():
    *_, name, last = path.split("/")
    np.testing.assert_array_equal(leaf, before[name][last], err_msg=path)
  elsewhere, sharded = run(config, mesh_of(MESHES["three"]))
  np.testing.assert_allclose(elsewhere, losses, rtol=1e-5)  # float32 sums in another order
  assert fingerprints.fingerprint(sharded.frozen) == fingerprints.fingerprint(state.frozen)
  q = sharded.frozen["language_model/layers/q_proj/kernel_q"]
  assert q.addressable_shards[0].data.size * 4 == q.size  # fsdp 2 x tensor 2


def test_quantized_kernels_that_should_learn_are_refused(
  tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  config = tiny_config("finetune_full", "none", model={**WIDE, "quantize": "nf4"})
  with pytest.raises(
    config_lib.ConfigError, match=r"nf4: quantized kernels cannot be trained, but opti"
  ):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run" / runs.CONFIG_FILE).exists()


@pytest.mark.guard
def test_full_fine_tuning_moves_all_but_the_tower_on_any_mesh(tiny_config: ConfigMaker) -> None:
  rate = {"learning_rate": 2e-3, "projector_learning_rate": 2e-3}
  changes = merged(FULL, {"optimizer": rate})
  config = tiny_config("finetune_full", "pooling", train={"steps": 5}, **changes)
  losses, state = run(config, mesh_of(MESHES["one"]))
  assert losses[-1] < losses[0] - 0.2
  assert all(p.startswith("vision_tower/") for p in state.frozen)
  assert {x.dtype for x in state.trainable.values()} == {jnp.dtype("float32")}
  start, _, _ = _initial(config)
  for path, leaf in state.trainable.items():
    assert np.any(leaf != start.trainable[path]), path
  elsewhere, sharded = run(config, mesh_of(MESHES["three"]))
  np.testing.assert_allclose(elsewhere, losses, rtol=2e-5)  # as in test_sharding, at a higher rate
  head = sharded.trainable["language_model/lm_head/kernel"]
  assert head.addressable_shards[0].data.size * 4 == head.size


def _initial(config: config_lib.Config) -> Any:
  mesh = mesh_of(MESHES["one"])
  with jax.set_mesh(mesh):
    return setup.initial_state(config, mesh)


def test_weight_decay_leaves_biases_and_norms_alone() -> None:
  """With no gradient, AdamW's update is -rate * decay * value; the first step has no warm-up."""
  paths = {
    "projector/fc1/bias": False,
    "language_model/final_norm/scale": False,
    "language_model/layers/attn_norm/scale": False,
    "projector/fc1/kernel": True,
    "language_model/token_embed/embedding": True,
    "language_model/x/lora_a": True,
  }
  config = config_lib.OptimizerConfig(
    stage="finetune_full",
    weight_decay=0.5,
    warmup_ratio=0.0,
    learning_rate=0.1,
    projector_learning_rate=0.1,
  )
  tx = optimizer.build(config, 10, list(paths))
  values = {p: jnp.ones(3) for p in paths}
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, values), tx.init(values), values)
  for path, decayed in paths.items():
    assert optimizer.decays(path) == decayed
    np.testing.assert_allclose(updates[path], -0.05 if decayed else 0, rtol=1e-6, err_msg=path)


def test_first_moments_may_be_bfloat16(tiny_config: ConfigMaker) -> None:
  changes = merged(FULL, {"optimizer": {"moment_dtype": "bfloat16"}})
  state, _, _ = _initial(tiny_config("finetune_full", "none", **changes))
  seen: dict[str, set[str]] = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
    field = [k.name for k in keys if isinstance(k, jax.tree_util.GetAttrKey)]
    if leaf.ndim:
      seen.setdefault(field[-1], set()).add(str(leaf.dtype))
  assert seen == {"mu": {"bfloat16"}, "nu": {"float32"}}


@pytest.mark.slow
def test_a_fully_fine_tuned_run_goes_out_and_comes_back(
  tiny_config: ConfigMaker, tmp_path: Path
) -> None:
  sizes = {"language_model": {"kv_heads": 4}}
  config = tiny_config(
    "finetune_full", "pooling", model=merged(FULL["model"], sizes), train={"steps": 2}
  )
  loop.train(config, tmp_path / "run")
  source = opening.open_any(tmp_path / "run", formats.Options())
  export.export(source, "llava", tmp_path / "out")
  back = formats.open_checkpoint(tmp_path / "out")
  run_leaves = own_folders.open_own(tmp_path / "run").params()
  start = _initial(dataclasses.replace(config))[0].trainable
  for path, leaf in back.leaves.items():
    np.testing.assert_array_equal(leaf.read(), run_leaves[path], err_msg=path)
    if path in start and path.endswith("kernel"):
      assert np.any(leaf.read() != start[path]), path
  assert back.leaves.keys() == run_leaves.keys()
