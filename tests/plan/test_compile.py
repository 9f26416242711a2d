"""The TPU's compiler: what is said without it; with libtpu, real compiles."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import explain, memory, report, topologies
from llava_sp_jax.plan.cost import SLOW
from llava_sp_jax.training import setup
from tests.conftest import ConfigMaker


def test_a_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "libtpu", None)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(compile_lib.PlanError, match=r'no module libtpu\); pip install "jax\[tpu\]'):
    compile_lib.check_installed(topologies.topology("v5e-16"))


LIBTPU = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason='libtpu is not installed: pip install "jax[tpu]"',
)


def test_the_user_s_options_reach_the_compiler(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  started: dict[str, str] = {}

  def popen(command: list[str], env: dict[str, str], **more: object) -> object:
    started.update(env)
    raise compile_lib.PlanError("enough")

  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_some=false")
  monkeypatch.setattr(compile_lib.subprocess, "Popen", popen)
  monkeypatch.setattr(compile_lib, "check_installed", lambda topology: None)
  topology = topologies.topology("h100x8")
  with pytest.raises(compile_lib.PlanError, match="enough"):
    compile_lib.compile_config(small(512), topology, "train", keep=tmp_path)
  assert started["XLA_FLAGS"].split()[0] == "--xla_gpu_some=false"
  assert json.loads((tmp_path / "request.json").read_text())["options"] == "--xla_gpu_some=false"


def test_options_are_those_that_the_user_chose_for_this_compiler() -> None:
  environment = {
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_a=1 --xla_cpu_b=2",
    "LIBTPU_INIT_ARGS": " --xla_tpu_c=true  --xla_tpu_use_enhanced_launch_barrier=true",
  }
  tpu, gpu = topologies.topology("v5e-4"), topologies.topology("h100x8")
  assert compile_lib.options(tpu, environment) == "--xla_a=1 --xla_tpu_c=true"
  assert compile_lib.options(gpu, environment) == "--xla_a=1"
  assert compile_lib.options(tpu, {}) == ""
  assert compile_lib.FLAGS == setup.FLAGS


def test_a_full_plan_without_code_is_an_error(
  monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
  def run(folder: Path, dumped: str, fast: bool) -> str:
    (folder / f"module_1.jit_{dumped}.x{compile_lib.SCHEDULE}").write_text("HloModule x")
    (folder / f"module_1.jit_{dumped}.x{compile_lib.BUFFERS}").write_text("")
    return "RuntimeError: out of memory"

  monkeypatch.setattr(compile_lib, "_run", run)
  monkeypatch.setattr(compile_lib, "check_installed", lambda topology: None)
  with pytest.raises(compile_lib.PlanError, match=r"no code was generated .*out of memory"):
    compile_lib.compile_config(
      small(512), topologies.topology("v5e-4"), "train", keep=tmp_path, fast=False
    )


LAYERS = 32


def small(length: int, **model: str) -> config_lib.Config:
  """Layers that are large enough to be in HBM, as those of real models are."""
  text = {"vocab_size": 1024, "width": 1024, "layers": LAYERS, "heads": 8, "kv_heads": 8}
  return config_lib.from_dict(
    {
      "name": "small",
      "model": {
        "tower": {"image_size": 28, "width": 128, "layers": 2, "heads": 2, "mlp_width": 256},
        "projector": {"variant": "none"},
        "language_model": {**text, "mlp_width": 2048},
        "lora": {"rank": 8},
        **model,
      },
      "data": {"row_length": length},
      "train": {"batch_size": 4},
      "mesh": {"base": "replicate"},
    }
  )


def planned(config: config_lib.Config, what: str, name: str = "v5e-4") -> report.Plan:
  topology = topologies.topology(name)
  return report.make(config, topology, what, compile_lib.compile_config(config, topology, what))


@pytest.mark.guard
@LIBTPU
@pytest.mark.parametrize("quantize", ["none", "int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_layer_reads_its_own_kernels(quantize: str) -> None:
  """Not those of all layers, whatever views and copies of the stack the compiler makes; and attention
  computes its products on the tiles that the triangle touches."""
  found = planned(small(2048, quantize=quantize), "train").programs["train"].cost
  assert found is not None
  kernels = [e for e in found.entries if re.search(r"Dense_0/|QuantizedDense_0/", e.op_name)]
  width = {"none": 2, "int8": 1, "nf4": 0.5}[quantize]
  layer = 1024 * 2048 * width
  activations = 2 * 2048 * (1024 + 2048) * 2  # a row of inputs and outputs, read and written
  assert len(kernels) >= 14
  assert max(e.nbytes / e.count for e in kernels) <= layer + activations < LAYERS * layer
  square = 2 * 8 * 2048 * 2048 * 128
  attention = {e.name.split(".")[0]: e.flops / e.count for e in found.entries if e.kind == "kernel"}
  assert attention == {
    "flash_forward": 2 * square * 36 / 64,
    "flash_backward": 5 * square * 36 / 64,
  }


WIDTH = 2048


def side_by_side(**model: str) -> config_lib.Config:
  """Layers without a loop, so large that what is between two products is worth a pass of its own."""
  fixed = {"dtype": "bfloat16", "frozen_dtype": "bfloat16", "remat": "projections"}
  return config_lib.override(
    small(2048, **fixed, **model),
    {
      "config.model.language_model.layers": "4",
      "config.model.language_model.width": str(WIDTH),
      "config.model.language_model.heads": "16",
      "config.model.language_model.kv_heads": "16",
      "config.model.language_model.mlp_width": str(4 * WIDTH),
      "config.model.lora.rank": "128",
      "config.model.lora.dropout": "0.05",
      "config.model.scan_unroll": "4",
    },
  )


@pytest.mark.guard
@LIBTPU
def test_an_activation_is_the_end_of_the_product_that_makes_it() -> None:
  """Adapters read it; they do not compute it again."""
  found = planned(side_by_side(), "train", "v6e-4")
  cost, rate = found.programs["train"].cost, found.topology.chip.vector_rate
  assert cost is not None
  reading = [e for e in cost.entries if e.op_name.endswith("layers/down_proj/dot_general")]
  forward = [e for e in reading if "transpose" not in e.op_name]
  assert len(forward) >= 4
  operations = [e.seconds / e.count * rate / (2048 * 4 * WIDTH) for e in forward]
  assert max(operations) < 8  # to each of its numbers: three of dropout; an activation has a dozen


@pytest.mark.guard
@LIBTPU
def test_gradients_of_int8_products_change_their_layout_in_bfloat16() -> None:
  found = planned(side_by_side(quantize="int8", frozen_matmul="int8"), "train", "v6e-4")
  cost = found.programs["train"].cost
  assert cost is not None
  assert any("QuantizedDense_0" in e.op_name and "transpose" in e.op_name for e in cost.entries)
  passes = [e for e in cost.entries if e.kind == "memory" and re.match("copy|convert", e.name)]
  assert [e.name for e in passes if e.nbytes >= 2048 * WIDTH * 4] == []


@pytest.mark.guard
@LIBTPU
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_slices_exchange_sums(accumulate: int) -> None:
  """Adapters' gradients cross the network between slices once; the small projector's with each part.

  Each chip sends its part of them.
  """
  settings = {"mesh.data": 2, "train.batch_size": 8 * accumulate, "train.accumulate": accumulate}
  config = config_lib.override(small(512), {f"config.{k}": str(v) for k, v in settings.items()})
  found = planned(config, "train", "v5e-4x2")
  assert found.about["mesh"] == {"data": 2, "fsdp": 4, "tensor": 1}
  cost = found.programs["train"].cost
  assert cost is not None
  received = cost.collectives[SLOW][0]
  each = 4 * 2 * 1024 * 8 + 3 * (1024 + 2048) * 8  # adapters of a layer
  projector = 128 * 1024 + 1024 * 1024
  sent = (LAYERS * each + accumulate * projector) * 2 / 4  # in bfloat16, a quarter on each chip
  assert received == pytest.approx(sent, rel=0.1)


@pytest.mark.slow
@LIBTPU
def test_what_cannot_fit_is_not_compiled() -> None:
  """The caches of an evaluation alone exceed a chip; the message says which part of it."""
  config = config_lib.override(small(2048), {"config.train.batch_size": "4096"})
  found = planned(config, "eval")
  assert not found.fits
  assert all(program.compiled.module is None for program in found.programs.values())
  assert "GiB  prefixes" in str(explain.refusal(found))


@pytest.mark.guard
@LIBTPU
def test_full_knows_the_compiler_s_cycles(tiny_config: ConfigMaker) -> None:
  """The same schedule with code: cycle counts for its matmuls, and another time of the step."""
  config = tiny_config(model={"dtype": "bfloat16", "frozen_dtype": "bfloat16"})
  topology = topologies.topology("v5e-4")
  found = [
    report.make(
      config, topology, "train", compile_lib.compile_config(config, topology, "train", fast=fast)
    )
    for fast in (True, False)
  ]
  assert [f.largest.compiled.full for f in found] == [False, True]
  assert found[0].used == found[1].used
  assert found[0].seconds != found[1].seconds > 0
  assert "the compiler's cycles" in found[1].record()["predictor"]


@pytest.mark.guard
@LIBTPU
@pytest.mark.parametrize("what", ["train", "eval"])
def test_a_real_compile(tiny_config: ConfigMaker, what: str) -> None:
  config = tiny_config(model={"dtype": "bfloat16", "frozen_dtype": "bfloat16"})
  config = config_lib.override(config, {"config.data.row_length": "128"})
  found = planned(config, what)
  assert found.fits
  assert found.seconds > 0
  assert set(found.programs) == set(compile_lib.PROGRAMS[what])
  for name, program in found.programs.items():
    assert program.cost is not None
    assert memory.TEMPORARIES in program.parts
    assert (program.turn > 0) == (name == "decode")
  parts = {part for program in found.programs.values() for part in program.parts}
  assert parts >= ({"batch"} if what == "train" else {"cache", "parameters", "prefixes", "state"})
