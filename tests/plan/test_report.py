"""Plans are refused with their largest buffers; records and their formula."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
from pathlib import Path

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax import provenance
from llava_sp_jax.files import FormatError
from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import cost, explain, kernels, records, report, topologies
from tests.plan.plans import GIB, evaluation, plan


def test_what_does_not_fit_is_refused_with_its_largest_buffers() -> None:
  large = plan(20 * GIB)
  assert not large.fits
  text = str(explain.refusal(large))
  assert (
    "does not fit: 20.00 GiB of HBM per device on v5e-16, 15.75 GiB there; 4.25 GiB too many"
    in text
  )
  assert "4.000 GiB  bf16[32,8,2048,4096]  forward/layers/dynamic_update_slice" in text
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
  text = explain.text(good)
  assert "MFU 0.500" in text
  assert f"the recipe's 1,000 steps: {2.0 * 1000 / 86400:.2f} days" in text
  train = dataclasses.replace(good.config.train, epochs=2.0)
  text = explain.text(
    dataclasses.replace(good, config=dataclasses.replace(good.config, train=train))
  )
  assert "train.epochs=2, of as many steps as the data give; 1,000 steps: 0.02 days" in text


def test_a_record_says_which_options_of_the_compiler_were_chosen() -> None:
  """Another program may come of them, so it is another record."""
  plain = plan(8 * GIB, useful_flops=1e18)
  chosen = plan(8 * GIB, useful_flops=1e18, options="--xla_tpu_some=true")
  assert "options" not in plain.record()
  assert chosen.record()["options"] == "--xla_tpu_some=true"
  assert "options" in records.RECORD_KEYS
  said = "with your options of the compiler: --xla_tpu_some=true"
  assert said in explain.text(chosen)
  assert "your options" not in explain.text(plain)
  assert said in str(explain.refusal(plan(20 * GIB, options="--xla_tpu_some=true")))
  assert " --xla_tpu_some=true |" in records.table([chosen.record()])


def test_a_record_says_what_it_is_of() -> None:
  """Whoever reads a record can compile the same step again, and knows what its tokens are."""
  made = plan(8 * GIB, mesh={"fsdp": 16}, useful_flops=1e18)
  made = dataclasses.replace(made, row=kernels.Row(2, 0.75))
  changed = config_lib.override(
    made.config,
    {"config.train.accumulate": "4", "config.model.remat": "full", "config.mesh.base": "replicate"},
  )
  made = dataclasses.replace(made, config=changed)
  record = made.record()
  wanted = {"accumulate": 4, "remat": "full", "base": "replicate", "mesh": {"fsdp": 16}}
  assert wanted.items() <= record.items()
  assert record["compiler"] == compile_lib.compiler(made.topology)
  assert (record["filled"], record["samples"]) == (0.75, 2)
  assert record["tokens_per_second"] == 128 * 2048 // 2 * 0.75
  assert record["mfu"] == plan(8 * GIB, mesh={"fsdp": 16}, useful_flops=1e18).record()["mfu"]
  assert "| 128 | 2048 | 1 | 0.75 | 2 | 16 | 4 | full | replicate |" in records.table([record])
  printed = explain.text(made)
  assert "mesh fsdp 16, accumulate 4, remat full, base replicate, quantize none" in printed
  assert f"{128 * 2048 // 2 * 0.75:,.0f} tokens/s that count: 75.0%" in printed


def identity(made: report.Plan) -> list[object]:
  """A later record replaces one that is the same in these values."""
  record = made.record()
  return [record.get(key) for key in records.RECORD_KEYS]


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("train.accumulate", "4"),
    ("model.remat", "full"),
    ("mesh.base", "replicate"),
    ("data.images_per_row", "3"),
    ("model.lora.rank", "8"),
    ("optimizer.moment_dtype", "bfloat16"),
  ],
)
def test_plans_that_differ_stand_side_by_side(key: str, value: str) -> None:
  made = plan(8 * GIB, useful_flops=1e18)
  changed = config_lib.override(made.config, {f"config.{key}": value})
  other = dataclasses.replace(made, config=changed)
  assert identity(made) == identity(plan(8 * GIB, seconds=3.0, useful_flops=1e18))
  assert identity(other) != identity(made)


def test_a_share_that_is_filled_and_a_full_plan_stand_side_by_side() -> None:
  made = plan(8 * GIB, useful_flops=1e18)
  compiled = dataclasses.replace(made.largest.compiled, full=True)
  full = dataclasses.replace(made.largest, compiled=compiled)
  filled = dataclasses.replace(made, row=kernels.Row(1, 0.5))
  found = [identity(p) for p in (made, filled, dataclasses.replace(made, programs={"train": full}))]
  assert all(one != other for i, one in enumerate(found) for other in found[:i])


def test_published_runs_say_nothing_of_a_full_plan() -> None:
  """The ratios are those of quick plans."""
  made = plan(8 * GIB, useful_flops=1e18)
  compiled = dataclasses.replace(made.largest.compiled, full=True)
  full = dataclasses.replace(
    made, programs={"train": dataclasses.replace(made.largest, compiled=compiled)}
  )
  assert made.record()["step_seconds_published"]
  assert full.record()["step_seconds_published"] is None
  assert "compared with quick plans" in explain.text(full)


@pytest.mark.parametrize("content", ['{"figures": {"a": 1}}', '[{"seconds": 1}]', "{", "[1]"])
def test_records_of_something_else_are_refused_before_a_compile(
  tmp_path: Path, content: str
) -> None:
  (tmp_path / "out.json").write_text(content)
  with pytest.raises(FormatError, match=r"out\.json: expected the plans of earlier commands"):
    records.check(tmp_path / "out")
  records.check(tmp_path / "new")


def test_a_compiler_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
  topology = topologies.topology("v5e-16")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu" or None)
  monkeypatch.setattr(importlib.metadata, "version", lambda name: f"9 of {name}")
  assert compile_lib.compiler(topology) == "libtpu 9 of libtpu"
  assert compile_lib.compiler(topologies.topology("h100x8")) == ""


def test_an_evaluation_adds_up_the_programs_of_the_engine() -> None:
  """Rows are filled by several runs of tower and prefill; one iteration of the loop decodes."""
  made = evaluation()
  assert made.seconds == 8 + 8 + 1
  assert made.used == 2 * GIB  # with what is in memory beside the program's own
  record = made.record()
  assert record["step_seconds"] == 17
  assert record["decode_step_seconds"] == 0.5
  assert record["programs"]["grow"] == {"runs": 8, "seconds": 1.0, "hbm_gib": 2.0}
  printed = explain.text(made)
  assert "8 times to fill 128 rows: 8.0000 s" in printed
  assert "prefill of all rows 17.0000 s predicted" in printed
  assert "decode step 500.000 ms predicted, 256 tokens/s" in printed
  small = dataclasses.replace(made.topology, chip_name="v5e")
  beside = made.programs["grow"].compiled.about | {"beside": {"prefixes": 20 * GIB}}
  grow = dataclasses.replace(
    made.programs["grow"],
    compiled=dataclasses.replace(made.programs["grow"].compiled, about=beside),
  )
  large = dataclasses.replace(made, topology=small, programs={**made.programs, "grow": grow})
  message = str(explain.refusal(large))
  assert "5.25 GiB too many, in the program grow (prefills what prompts share" in message
  assert "20.000 GiB  prefixes" in message
  assert "data.row_length" in message


def test_memory_that_a_program_does_not_read_is_counted() -> None:
  """Its arguments are in memory, also those that the compiler leaves out of the program."""
  found = plan(8 * GIB, arguments={"parameters": 9 * GIB}).programs["train"]
  assert found.parts[report.UNREAD] == 9 * GIB - 2 * GIB  # a quarter of the 8 is read
  assert found.used == 8 * GIB + 7 * GIB


def test_an_evaluation_says_what_a_step_reads(tmp_path: Path) -> None:
  """A record is that of its formats; one of floats is like those from before there were others."""
  file = tmp_path / "plan"
  bytes_of, kept = {}, None
  for weights, cache in (("none", "float"), ("int8", "int8"), ("none", "float")):
    made = evaluation(quantize=weights, cache=cache)
    text = explain.text(made)
    assert f"weights {weights}, cache {cache}: a decode step has to read" in text
    record = made.record()
    bytes_of[weights] = record["decode_bytes"]
    assert ("weights" in record) == ("cache" in record) == (weights != "none")
    kept = records.append(file, record)
  assert kept is not None
  assert [r.get("cache") for r in kept] == ["int8", None]
  assert "| x int8 int8 |" in records.table(kept)
  # The default model is of 7B: 6.6e9 weights; keys and values of 128 x 2048 positions.
  positions = 128 * 2048 * 2 * 32 * 32
  kernels, others = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096 + 65 * 4096
  assert bytes_of["none"] == 2 * (kernels + others) + positions * 128 * 2
  scales = 32 * (5 * 4096 + 2 * 11008) * 4
  assert bytes_of["int8"] == kernels + scales + 2 * others + positions * (128 + 4)


def test_records_replace_their_older_selves(tmp_path: Path) -> None:
  file = tmp_path / "plan"
  records.append(file, plan(8 * GIB, 2.0, useful_flops=1.0).record())
  records.append(file, plan(20 * GIB).record() | {"topology": "v5e-64"})
  kept = records.append(file, plan(8 * GIB, 1.5, useful_flops=1.0).record())
  held = json.loads((tmp_path / "plan.json").read_text())
  assert held["figures"] == kept
  assert held["record"]["commit"] == provenance.commit()
  assert [(r["topology"], r["step_seconds"]) for r in kept] == [
    ("v5e-64", None),
    ("v5e-16", 1.5),
  ]
  assert "does not fit" in records.table(kept)


def test_no_speed_for_gpus() -> None:
  made = plan(8 * GIB)
  program = dataclasses.replace(made.programs["train"], cost=None)
  gpu = dataclasses.replace(
    made, topology=topologies.topology("h100x8"), programs={"train": program}
  )
  assert "no speed is predicted for h100x8" in explain.text(gpu)
  assert gpu.record()["predictor"] == "memory only"


@pytest.mark.parametrize(
  ("name", "rank", "section"),
  [
    ("jit(train_step)/jvp(LlavaSP)/language_model/layers/q_proj/dot_general", 8, "adapters"),
    (
      "jit(train_step)/jvp(LlavaSP)/language_model/layers/q_proj/dot_general",
      0,
      "decoder matmuls and norms",
    ),
    (
      "jit(train_step)/jvp(LlavaSP)/language_model/layers/q_proj/Dense_0/dot_general",
      8,
      "decoder matmuls and norms",
    ),
  ],
)
def test_a_model_without_adapters_has_no_time_in_them(name: str, rank: int, section: str) -> None:
  """Full fine-tuning: the kernels' products have the names that those of adapters have elsewhere."""
  made = plan(8 * GIB)
  model = dataclasses.replace(made.config.model, lora=config_lib.LoraConfig(rank=rank))
  spent = cost.Cost(1.0, entries=[cost.Entry("fusion", name, "matmul", 1.0)])
  program = dataclasses.replace(made.programs["train"], cost=spent)
  made = dataclasses.replace(
    made,
    config=dataclasses.replace(made.config, model=model),
    programs={"train": dataclasses.replace(program, compiled=made.largest.compiled)},
  )
  compiled = dataclasses.replace(made.largest.compiled, about={"useful_flops": 1.0})
  made = dataclasses.replace(made, programs={"train": report.Program(compiled, spent)})
  assert f"1.0000 s 100.0%  {section}" in explain.text(made)
