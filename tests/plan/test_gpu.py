"""Plans for GPUs: what is said without their compiler; with jax's CUDA plugin, real compiles."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.hardware import GIB
from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import memory, report, topologies
from llava_sp_jax.training import setup
from tests.conftest import REPOSITORY

PLUGINS = compile_lib.NEEDS["cuda"][0]
CUDA = pytest.mark.skipif(
  all(importlib.util.find_spec(name) is None for name in PLUGINS),
  reason="jax's CUDA plugin is not installed: pip install jax-cuda12-plugin (0.5 GB; no GPU needed)",
)
FORWARD, BACKWARD = r"__cudnn\$fmha\w*Softmax\b", r"__cudnn\$fmha\w*SoftmaxBackward\b"


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(
    compile_lib.PlanError, match=r"h200x8: .*jax_cuda12_plugin\); pip install \"jax-cuda12"
  ):
    compile_lib.check_installed(topologies.topology("h200x8"))


def test_options_of_the_compiler_are_the_user_s_first() -> None:
  name = "xla_gpu_enable_latency_hiding_scheduler"
  assert setup.compiler_options("gpu", {}) == setup.compiler_options("cuda", {}) == {name: True}
  assert setup.compiler_options("gpu", {"XLA_FLAGS": f"--xla_dump_to=x --{name}=false"}) is None
  tpu = setup.compiler_options("tpu", {"LIBTPU_INIT_ARGS": "--xla_enable_async_all_gather=false"})
  assert tpu is not None
  assert "xla_enable_async_all_gather" not in tpu
  assert "xla_enable_async_all_reduce" in tpu
  assert setup.compiler_options("cpu", {}) is None


def small(**model: Any) -> config_lib.Config:
  text = {"vocab_size": 1024, "width": 512, "layers": 4, "heads": 4, "kv_heads": 4}
  return config_lib.from_dict(
    {
      "name": "small",
      "model": {
        "tower": {"image_size": 28, "width": 128, "layers": 2, "heads": 2, "mlp_width": 256},
        "projector": {"variant": "none"},
        "language_model": {**text, "mlp_width": 1024},
        "lora": {"rank": 8},
        **model,
      },
      "data": {"row_length": 256, "packing": "first_fit", "samples_per_row": 4},
      "train": {"batch_size": 8},
    }
  )


def compiled(config: config_lib.Config, name: str, folder: Path) -> tuple[report.Plan, str]:
  """The plan of a train step, and the text of its compiled program."""
  topology = topologies.topology(name)
  found = compile_lib.compile_config(config, topology, "train", folder)
  (program,) = folder.glob("*jit_train_step*after_optimizations.txt")
  return report.make(config, topology, "train", found), program.read_text()


@pytest.mark.guard
@CUDA
@pytest.mark.parametrize("name", ["h100x1", "h100x8"])
def test_packed_rows_have_no_bias_and_attention_runs_once_a_layer(
  name: str, tmp_path: Path
) -> None:
  plan, program = compiled(small(), name, tmp_path)
  assert plan.fits
  assert plan.predictor == "none"
  assert plan.limit == plan.topology.chip.limit
  assert len(re.findall(FORWARD, program)) == len(re.findall(BACKWARD, program)) == 1
  assert "fmhaScaleBias" not in program
  assert not re.search(r"\[\d+,1,256,256\]", program)
  rows = 8 // plan.topology.chips
  assert f"f32[{rows * 5},4,256]" in program, "a device's rows, four samples of each and padding"


def gathered_alone(program: str) -> list[str]:
  """Names of the gathers in the loops over layers beside which nothing is computed."""
  alone: list[str] = []
  for computation in re.split(r"\n(?=\S)", program):
    if "__cudnn" not in computation:
      continue
    started: dict[str, int] = {}
    computed = 0
    for line in computation.splitlines():
      if start := re.match(r"\s+%(\S+) = .* all-gather-start\(", line):
        started[start[1]] = computed
      elif done := re.search(r" all-gather-done\([^%]*%([\w.-]+)", line):
        alone += [done[1]] if started[done[1]] == computed else []
      elif re.search(r" (fusion|custom-call|dot)\(", line):
        computed += 1
      assert " all-gather(" not in line
    assert started
  return alone


@pytest.mark.guard
@CUDA
def test_weights_are_gathered_while_a_layer_is_computed(tmp_path: Path) -> None:
  _, program = compiled(small(), "h100x8", tmp_path)
  assert gathered_alone(program) == []


@pytest.mark.guard
@CUDA
@pytest.mark.parametrize(
  ("model", "row_length", "forward"),
  [({"remat": "full"}, 256, 2), ({"attention": "cudnn"}, 256, 1), ({"attention": "cudnn"}, 255, 1)],
)
def test_what_else_cudnn_compiles_to(
  model: dict[str, str], row_length: int, forward: int, tmp_path: Path
) -> None:
  """Full recomputation runs it twice; a dense mask is a bias, also of rows of odd length."""
  config = small(**model)
  data = dataclasses.replace(config.data, row_length=row_length)
  _, program = compiled(dataclasses.replace(config, data=data), "h100x1", tmp_path)
  assert len(re.findall(FORWARD, program)) == forward
  assert ("fmhaScaleBias" in program) == (model.get("attention") == "cudnn")


@pytest.mark.guard
@CUDA
def test_memory_is_that_of_the_h200(tmp_path: Path) -> None:
  """The measured step of docs/results/accelerator: temporaries within 3%, all of it compiled anew."""
  figures = json.loads((REPOSITORY / "docs/results/accelerator.json").read_text())["figures"]
  (measured,) = [row for row in figures["train"] if row["temporaries_gib"]]
  config = config_lib.from_dict(
    {
      "name": "accelerator",
      "model": {
        "projector": {"variant": "cropping"},
        "lora": {"rank": 128, "alpha": 256.0, "dropout": measured["lora_dropout"]},
        "remat": measured["remat"],
        "attention": measured["attention"],  # with a dense mask, as it was then
        "frozen_dtype": "bfloat16",
        "dtype": "bfloat16",
      },
      "data": {"row_length": measured["row_length"], "images_per_row": measured["images"]},
      "train": {"batch_size": measured["rows"]},
    }
  )
  plan, _ = compiled(config, "h200x1", tmp_path)
  found = plan.programs["train"].parts[memory.TEMPORARIES] / GIB
  assert found == pytest.approx(measured["temporaries_gib"], rel=0.03)
