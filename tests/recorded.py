"""What the records under docs/results say, as the numbers that README and docs quote."""

from __future__ import annotations

import json
import statistics
from typing import Any

from tests.conftest import REPOSITORY


def result(name: str) -> Any:
  """The figures of a record."""
  return json.loads((REPOSITORY / "docs/results" / f"{name}.json").read_text())["figures"]


def host(samples: str, what: str) -> float:
  return float(result("hosts")["cases"][samples][what])


def cost_of_a_row(series: str, first: str, last: str) -> float:
  """By how many percent a row costs the chips of a slice more than those of another."""
  points = result("scaling")[series]
  return 100 * (points[last]["chip_seconds_per_row"] / points[first]["chip_seconds_per_row"] - 1)


SPECIAL = (
  "quantize",
  "products",
  "samples",
  "unrolled",
  "options",
)  # that a plan has if it is no plain one


def planned(model: str, topology: str, **special: Any) -> dict[str, Any]:
  """The one plan of a training step with these settings, and with no others of SPECIAL."""
  wanted = {name: special.pop(name, None) for name in SPECIAL} | special
  (found,) = (
    r
    for r in result("plan")
    if (r["model"], r["topology"], r["what"]) == (model, topology, "train")
    and all(r.get(name) == value for name, value in wanted.items())
  )
  return dict(found)


def plan(model: str, topology: str, **special: Any) -> float:
  return float(planned(model, topology, **special)["step_seconds"])


def faster_in_int8(topology: str, *bases: str) -> float:
  """How many times as fast products in int8 make a step of 7B, as predicted.

  `bases` are the placements of the base for floats and for int8.
  """
  model = LORA.format("cropping")
  floats = planned(model, topology, base=bases[0])
  int8 = planned(model, topology, base=bases[-1], quantize="int8", products="int8")
  return float(floats["step_seconds"] / int8["step_seconds"])


def accuracy(job: str, way: str) -> float:
  """Right answers of all seeds in percent, with products in floats or int8."""
  found = [r["accuracy"] for r in result("frozen_matmul")["jobs"][job] if r["way"] == way]
  return 100 * statistics.mean(found)


def pod(mesh: tuple[int, int, int], value: str, topology: str = "v6e-4") -> float:
  """What is predicted of an evaluation in bfloat16."""
  found = [r for r in result("plan") if (r["topology"], r["what"]) == (topology, "eval")]
  (held,) = (
    r for r in found if tuple(r["mesh"].values()) == mesh and not {"weights", "options"} & r.keys()
  )
  return float(held[value])


def minutes_of_the_paper() -> float:
  tasks = result("paper_evaluation")["ways"][0]["tasks"]
  return 60 * sum(task["hours"] for task in tasks.values())


def answered(name: str, variant: str = "pooling") -> list[float]:
  """Right answers in percent, of each seed."""
  return [100 * r["accuracy"] for r in result(name) if r["variant"] == variant]


def minutes(name: str) -> float:
  return min(r["seconds"] for r in result(name)) / 60


def changed(dtype: str, precision: str, of: int) -> float:
  """Answers on the accelerator that are not the CPU's."""
  return next(
    r["changed"]
    for r in result("accelerator")["flips"]
    if (r["dtype"], r["matmul_precision"], r["questions"]) == (dtype, precision, of)
  )


def passed_trials() -> int:
  """Kill trials that passed, of 20."""
  trials = result("kill_trials")
  assert len(trials) == 20
  return sum(trial["passed"] for trial in trials)


def second_start(name: str, flags: str = "as installed") -> float:
  """Percent of the time of the first start until the first step."""
  starts = result("second_start")["starts"][flags]
  seconds = {start["name"]: start["to_first_step"] for start in starts}
  return float(100 * seconds[name] / seconds["first"])


def passed_trials_in_a_bucket(of: int) -> int:
  """Kill trials on runs in a bucket that passed."""
  trials = result("kill_trials_bucket")
  assert len(trials) == of
  assert {trial["place"] for trial in trials} == {"bucket"}
  return sum(trial["passed"] for trial in trials)


def changed_by_the_batch(of: int) -> int:
  """Answers in float32 that any batch, mesh or number of processes changed."""
  float32 = result("batch_invariance")["float32"]
  assert float32["answers"] == of
  return len({answer for way in float32["ways"].values() for answer in way["changed"]})


def memory_of_conversion() -> float:
  """Gigabytes, the most of any layout."""
  return max(r["peak_gb"] for r in result("conversion") if r["way"] == "llava-sp convert")


def workload(name: str) -> float:
  """How much faster than one question at a time."""
  return next(r["ratio"] for r in result("eval_throughput")["records"] if r["workload"] == name)


def perplexity(weights: str, cache: str = "") -> float:
  """By how many percent these formats raise the perplexity of SmolLM2."""
  rows = result("quantized")["perplexity"]
  return 100 * next(r["change"] for r in rows if (r["weights"], r["cache"]) == (weights, cache))


def changed_by_int4() -> int:
  """Answers of the demo that are not those of float weights in bfloat16."""
  return next(
    r["changed"]
    for r in result("quantized")["answers"]
    if (r["weights"], r["cache"]) == ("int4", "")
  )


def served(clients: int, of: str) -> float:
  """Tokens a second of the server, divided by those of the engine alone or of the torch server."""
  found = result("serving")
  rows = {
    side: {r["clients"]: r["tokens_per_s"] for r in found[side]} for side in ("ours", "torch")
  }
  other = found["offline_tokens_per_s"] if of == "engine" else rows[of][clients]
  return float(rows["ours"][clients] / other)


def step_of(weights: str) -> float:
  """Seconds of a decode step of one row on a CPU, divided by those with floats."""
  rows = {
    r["weights"]: r["step_ms"]
    for r in result("quantized")["speed"]
    if (r["rows"], r["cache"]) == (1, "")
  }
  return float(rows[weights] / rows[""])


# Means of the ablation as the table of docs/variants.md shows them.
VARIANTS = {"none": "81.4%", "register": "80.9%", "pooling": "83.5%", "cropping": "83.6%",
            "both": "84.4%", "cropping_sfe": "85.2%", "pooling_dfi": "84.5%"}  # fmt: skip


def mean_of(variant: str) -> float:
  return statistics.mean(answered("easy_vqa_ablation", variant))


LORA = "llava-sp-7b-{}-finetune-lora"


def seconds(name: str) -> float:
  return statistics.median(r["seconds"] for r in result(name))
