"""The TPU's compiler: what is said without it; with libtpu, real compiles."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import memory, report, topologies
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
  assert [f.compiled.full for f in found] == [False, True]
  assert found[0].used == found[1].used
  assert found[0].seconds != found[1].seconds > 0
  assert "the compiler's cycles" in found[1].record()["predictor"]


@pytest.mark.guard
@LIBTPU
@pytest.mark.parametrize("what", ["train", "eval"])
def test_a_real_compile(tiny_config: ConfigMaker, what: str) -> None:
  config = tiny_config(model={"dtype": "bfloat16", "frozen_dtype": "bfloat16"})
  topology = topologies.topology("v5e-4")
  found = report.make(config, topology, what, compile_lib.compile_config(config, topology, what))
  assert found.fits
  assert found.seconds > 0
  assert found.cost is not None
  assert found.cost.flops > 0
  assert bool(found.cost.loops) == (what == "eval")
  assert set(found.compiled.memory.parts) >= {"batch", memory.TEMPORARIES}
