"""The accelerator benchmark: its record, its time, and (slow) all of it on a CPU."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llava_sp_jax.infer.requests import Answer
from llava_sp_jax.plan import memory

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
KEYS = ["record", "figures"]
SPOKEN = {"peer", "rates", "correct", "train", "decode", "prefill", "engine", "flips", "variants"}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
  """accelerator.py as it runs: its own folder is where it finds its files."""
  monkeypatch.syspath_prepend(str(BENCHMARKS))
  monkeypatch.setattr(sys, "argv", ["benchmarks/accelerator.py"])
  import accelerator

  return accelerator


def test_the_record_has_what_a_figure_belongs_to(
  benchmark: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
  out = tmp_path / "record"
  benchmark.main(["--tiny", "--only", "rates", "--out", str(out)])
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  record = json.loads(out.with_suffix(".json").read_text())
  assert list(record) == KEYS
  said = [{k: v for k, v in line.items() if k not in ("at", "section")} for line in lines]
  assert record["figures"] == {"rates": said}
  assert {line["section"] for line in lines} == {"rates"}
  assert said[0]["peak_tflops"] is None, "nobody knows the peak of a CPU"
  assert [line["product"] for line in said if "tflops" in line] == ["bfloat16", *["float32"] * 2]
  assert all(line["tflops"] > 0 for line in said if "tflops" in line)
  assert said[-1]["read_gb_s"] > 0
  assert record["record"]["versions"]["jax"] == jax.__version__


def test_a_part_that_fails_costs_nothing_else(
  benchmark: Any, capsys: pytest.CaptureFixture[str]
) -> None:
  record = benchmark.Record(benchmark.arguments(["--seconds", "50"]))

  def fail() -> None:
    raise RuntimeError("RESOURCE_EXHAUSTED: no memory")

  assert not record.part("train", 10, fail, rows=4)
  assert not record.part("train", 60, lambda: {"seconds": 1.0}, rows=2)
  assert record.part("train", 10, lambda: {"seconds": math.nan, "mfu": 1 / 3}, rows=1)
  failed, skipped, done = record.figures["train"]
  assert failed == {"rows": 4, "error": "RuntimeError: RESOURCE_EXHAUSTED: no memory"}
  assert skipped["rows"] == 2
  assert "60 are needed" in skipped["skipped"]
  assert done == {"rows": 1, "seconds": None, "mfu": 0.333333}
  assert record.last("train", "mfu") == 0.333333
  assert record.last("train", "tokens") is None
  assert len(capsys.readouterr().out.splitlines()) == 3


def test_options_that_do_not_go_together_are_refused(benchmark: Any) -> None:
  for argv in (["--only", "rates,speed"], ["--checkpoint", "runs/x"]):
    with pytest.raises(SystemExit):
      benchmark.arguments(argv)


def test_as_many_rows_as_fit(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
  """Temporaries of 2 rows take 6 GiB, 10 do not grow, 2 stay free: of 63 there is room for 17."""
  import accelerator_training as training

  gib = 1 << 30
  monkeypatch.setattr(training.models, "memory_limit", lambda: 63 * gib)
  parts = {"frozen": 10 * gib, memory.TEMPORARIES: 6 * gib}
  assert training.fitting(memory.Memory(parts, 16 * gib), 2) == 17


def test_what_plan_counts_of_a_program(benchmark: Any) -> None:
  """An argument that it does not read is not there."""
  import accelerator_training as training

  x = jnp.ones((256, 16))
  lowered = jax.jit(lambda params, key: params["w"] * 2).lower({"w": x}, jax.random.key(0))
  plan = training.planned(lowered, lowered.compile())
  assert plan.parts["parameters"] == plan.parts["results"] == x.nbytes
  assert "other arguments" not in plan.parts


def test_changed_answers_are_counted_by_their_tokens(benchmark: Any) -> None:
  import accelerator_flips as flips

  ours = [
    Answer("a", (1, 2), margin=0.5),
    Answer("b", (3,), margin=0.25),
    Answer("c", (), margin=2.0),
  ]
  theirs = [
    Answer("a", (1, 2), margin=0.5),
    Answer("b", (4,), margin=0.1),
    Answer("d", (5,), margin=3.0),
  ]
  assert flips.compare(ours, theirs) == {
    "questions": 3,
    "changed": 2,
    "largest_margin_changed": 2.0,
  }
  assert flips.compare(ours, ours)["changed"] == 0
  with pytest.raises(ValueError, match="no such image"):
    flips.compare(ours, [*theirs[:2], Answer("", (), "no such image")])


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(
  benchmark: Any, tiny_config: Any, tiny_data: Path, tmp_path: Path
) -> None:
  """Every section says figures, none an error; float32 is exact, and no answer changes in it."""
  from llava_sp_jax.training import loop

  run = tmp_path / "run"
  loop.train(tiny_config("finetune", train={"steps": 2}), run)
  assert set(benchmark.SECTIONS) == SPOKEN
  options = ["--tiny", "--seconds", "3000", "--checkpoint", str(run), "--data", str(tiny_data)]
  here = SPOKEN if importlib.util.find_spec("peft") else SPOKEN - {"peer"}
  options += ["--only", ",".join(here)]
  found = benchmark.main(options).figures
  assert set(found) == here
  for section, lines in found.items():
    assert not [line for line in lines if "error" in line or "skipped" in line], section
  exact = [line for line in found["correct"] if line["case"].startswith("float32 matmul")]
  assert [line["logits_error"] for line in exact] == [0.0]
  assert all(line["gradient_error_spatial"] < 0.2 for line in found["correct"][1:])
  step = found["train"][0]
  assert step["rows"] == 2
  assert step["tokens_per_s"] == pytest.approx(256 / step["seconds"], rel=1e-4)
  assert step["plan_gib"] > 0
  assert {line["quantize"] for line in found["decode"]} == {"none", "int8"}
  assert all(line["compiles"] == 0 for line in found["engine"] if "workload" in line)
  ways = {(line["dtype"], line["matmul_precision"]): line for line in found["flips"][1:]}
  assert ways["float32", "default"]["changed"] == ways["float32", "auto"]["changed"] == 0
  assert ways["bfloat16", "auto"]["questions"] == found["flips"][0]["questions"] > 0


def test_the_committed_page_is_that_of_the_record(benchmark: Any) -> None:
  import accelerator_page

  file = BENCHMARKS.parent / "docs/results/accelerator.json"
  record = json.loads(file.read_text())
  assert list(record) == KEYS
  assert file.with_suffix(".md").read_text() == accelerator_page.page(record)
