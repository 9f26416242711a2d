"""Plans are refused with their largest buffers; records and their formula."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from llava_sp_jax import provenance
from llava_sp_jax.plan import report, topologies
from tests.plan.plans import GIB, plan


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


def test_an_evaluation_says_what_a_step_reads(tmp_path: Path) -> None:
  """A record is that of its formats; one of floats is like those from before there were others."""
  file = tmp_path / "plan"
  bytes_of, kept = {}, None
  for weights, cache in (("none", "float"), ("int8", "int8"), ("none", "float")):
    made = dataclasses.replace(plan(8 * GIB), what="eval")
    model = dataclasses.replace(made.config.model, quantize=weights, cache=cache)
    made = dataclasses.replace(made, config=dataclasses.replace(made.config, model=model))
    text = report.text(made)
    assert f"weights {weights}, cache {cache}: a decode step has to read" in text
    record = made.record()
    bytes_of[weights] = record["decode_bytes"]
    assert ("weights" in record) == ("cache" in record) == (weights != "none")
    kept = report.append(file, record)
  assert kept is not None
  assert [r.get("cache") for r in kept] == ["int8", None]
  assert "| x int8 int8 |" in report.table(kept)
  # The default model is of 7B: 6.6e9 weights; keys and values of 128 x 2048 positions.
  positions = 128 * 2048 * 2 * 32 * 32
  kernels, others = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096 + 65 * 4096
  assert bytes_of["none"] == 2 * (kernels + others) + positions * 128 * 2
  scales = 32 * (5 * 4096 + 2 * 11008) * 4
  assert bytes_of["int8"] == kernels + scales + 2 * others + positions * (128 + 4)


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
