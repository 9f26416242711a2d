"""llava-sp plan: help, errors, refusals, records; with libtpu, a real compile."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llava_sp_jax import cli, provenance
from llava_sp_jax import config as config_lib
from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import cost, memory, report, topologies
from tests.conftest import REPOSITORY, ConfigMaker

RECIPE = str(REPOSITORY / "configs" / "finetune_lora.py")
GIB = 1 << 30


def plan(total: int, seconds: float = 2.0, **about: float) -> report.Plan:
  largest = (
    (4 * GIB, "bf16[32,8,2048,4096]", "jit(run)/jvp(LlavaSP)/layers/dynamic_update_slice"),
  )
  found = memory.Memory(
    {"frozen": total // 4, memory.TEMPORARIES: total - total // 4}, total, largest
  )
  compiled = compile_lib.Compiled(found, 9.0, {"mesh": {"fsdp": 16}, **about})
  config = config_lib.from_dict({"name": "x", "train": {"batch_size": 128, "steps": 1000}})
  return report.Plan(config, topologies.topology("v5e-16"), "train", compiled, cost.Cost(seconds))


def test_what_does_not_fit_is_refused_with_its_largest_buffers() -> None:
  large = plan(20 * GIB)
  assert not large.fits
  text = str(report.refusal(large))
  assert (
    "does not fit: 20.00 GiB of HBM per chip on v5e-16, 15.75 GiB there; 4.25 GiB too many" in text
  )
  assert "4.00 GiB  bf16[32,8,2048,4096]  forward/layers/dynamic_update_slice" in text
  assert "train.batch_size" in text
  record = large.record()
  assert (record["fits"], record["step_seconds"], record["mfu"]) == (False, None, None)


def test_records_and_their_formula() -> None:
  good = plan(8 * GIB, seconds=2.0, useful_flops=2.0 * 16 * 197e12 * 0.5)
  record = good.record()
  assert record["mfu"] == 0.5
  assert record["tokens_per_second"] == 128 * 2048 // 2
  assert {
    "model",
    "topology",
    "rows",
    "step_seconds",
    "mfu",
    "hbm_gib",
    "hbm_limit_gib",
    "predictor",
  } <= record.keys()
  text = report.text(good)
  assert "MFU 0.500" in text
  assert f"{2.0 * 1000 / 86400:.2f} days" in text


def test_records_replace_their_older_selves(tmp_path: Path) -> None:
  file = tmp_path / "plan"
  report.append(file, plan(8 * GIB, 2.0, useful_flops=1.0).record())
  report.append(file, plan(20 * GIB).record() | {"topology": "v5e-64"})
  records = report.append(file, plan(8 * GIB, 1.5, useful_flops=1.0).record())
  held = json.loads((tmp_path / "plan.json").read_text())
  assert held["figures"] == records
  assert held["record"]["commit"] == provenance.commit()
  assert [(r["topology"], r["step_seconds"]) for r in records] == [
    ("v5e-64", None),
    ("v5e-16", 1.5),
  ]
  assert "does not fit" in report.table(records)


def test_no_speed_for_gpus() -> None:
  gpu = dataclasses.replace(plan(8 * GIB), topology=topologies.topology("h100x8"), cost=None)
  assert "no speed is predicted for h100x8" in report.text(gpu)
  assert gpu.record()["predictor"] == "memory only"


def test_help_is_instant(capsys: pytest.CaptureFixture) -> None:
  started = time.monotonic()
  assert cli.main(["plan", "--help"]) == 0
  assert time.monotonic() - started < 5
  printed = capsys.readouterr().out
  assert all(
    f"--{name}" in printed for name in ("config", "topology", "what", "search", "out", "full")
  )
  assert all(name in printed for name in topologies.SLICES)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--topology", "v5e-16"], "no --config"),
    ([f"--config={RECIPE}", "--topology=v9"], "--topology: unknown 'v9'; known: "),
    ([f"--config={RECIPE}", "--topology=v5e-16", "--what=x"], "--what: unknown 'x'"),
    (
      [f"--config={RECIPE}", "--topology=v5e-16", "--search=many"],
      "--search: expected a whole number from 0, found 'many'",
    ),
    (
      [f"--config={RECIPE}", "--topology=v5e-16", "--top=0"],
      "--top: expected a whole number from 1",
    ),
    ([f"--config={RECIPE}", "--topology=v5e-16", "--frobnicate=1"], "unknown --frobnicate"),
  ],
)
def test_errors(capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
  assert cli.main(["plan", *arguments]) == 1
  assert message in capsys.readouterr().err


def test_a_missing_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setitem(sys.modules, "libtpu", None)
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(compile_lib.PlanError, match=r'no module libtpu\); pip install "jax\[tpu\]'):
    compile_lib.check_installed(topologies.topology("v5e-16"))


@pytest.mark.parametrize(
  ("options", "fast"), [([], True), (["--full=true"], False), (["--full", "false"], True)]
)
def test_full_asks_for_code(
  options: list[str], fast: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
  asked: list[bool] = []

  def compile_config(config: Any, topology: Any, what: str, keep: Any, fast: bool) -> Any:
    asked.append(fast)
    return dataclasses.replace(plan(8 * GIB).compiled, full=not fast)

  monkeypatch.setattr(compile_lib, "compile_config", compile_config)
  assert cli.main(["plan", f"--config={RECIPE}", "--topology=v5e-16", *options]) == 0
  assert asked == [fast]


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
