"""Compares stage 2 with frozen kernels multiplied in floats and in int8: answers and loss curves.

Usage: python benchmarks/frozen_matmul.py --name easy-VQA --out docs/results/frozen_matmul \\
         --recipe configs/easy_vqa.py:stage=finetune,init=runs/easy_vqa/pooling-0/pretrain

Trains the recipe, whose `init=` is a finished stage 1, for each seed and each way, and answers the
test questions with what was trained, in the way in which it was trained. Records of other names stay
in OUT. The same command continues what was stopped. Speeds are those of `llava-sp plan`, not of this
benchmark: a CPU gains nothing.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from llava_sp_jax import provenance
from llava_sp_jax.results import scores

# name -> settings of model.
WAYS: dict[str, dict[str, str]] = {
  "floats": {},
  "int8": {"quantize": "int8", "frozen_matmul": "int8"},
}
SMOOTH = 0.5  # share of the former values in a smoothed loss


def llava_sp(*arguments: str) -> None:
  print(f"\n$ llava-sp {shlex.join(arguments)}", flush=True)
  subprocess.run([sys.executable, "-m", "llava_sp_jax.cli", *arguments], check=True)


def trained(way: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
  """Trains and evaluates one run; returns its accuracy and losses."""
  run = Path(options.runs) / options.name / f"{way}-{seed}"
  settings = [f"--config.model.{key}={value}" for key, value in WAYS[way].items()]
  llava_sp("train", f"--config={options.recipe},seed={seed}", f"--workdir={run}", *settings)
  limit = [f"--limit={options.limit}"] if options.limit else []
  llava_sp("eval", f"--checkpoint={run}", f"--data={options.data}", f"--out={run}/eval", *limit)
  lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
  found = scores.read(run / "eval/scores.json")
  return {
    "way": way,
    "seed": seed,
    "accuracy": found.by_kind["all"]["accuracy"],
    "questions": found.answered,
    "steps": [line["step"] for line in lines if "loss" in line],
    "losses": [line["loss"] for line in lines if "loss" in line],
  }


def mean(records: list[dict[str, Any]], way: str) -> float:
  return 100 * statistics.mean(r["accuracy"] for r in records if r["way"] == way)


def page(report: dict[str, Any], picture_name: str) -> str:
  lines = [
    "# Frozen kernels multiplied in int8",
    "",
    "Stage 2 with `model.quantize=int8 model.frozen_matmul=int8` beside float kernels: the same",
    "stage 1, seeds and data. Answers are those of the trained model, in the way in which it was",
    "trained. Made by `python benchmarks/frozen_matmul.py`.",
    "",
    "| job | seed | questions | floats, right answers | int8 | last loss, floats | int8 |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, records in report["jobs"].items():
    for seed in sorted({r["seed"] for r in records}):
      a, b = (next(r for r in records if (r["way"], r["seed"]) == (way, seed)) for way in WAYS)
      lines.append(
        f"| {name} | {seed} | {a['questions']:,} | {a['accuracy']:.2%} | {b['accuracy']:.2%} | "
        f"{a['losses'][-1]:.4f} | {b['losses'][-1]:.4f} |"
      )
    lines.append(
      f"| {name} | mean | | {mean(records, 'floats'):.2f}% | {mean(records, 'int8'):.2f}% | | |"
    )
  return "\n".join([*lines, "", f"![losses of both]({picture_name})", ""])


def picture(report: dict[str, Any], path: Path) -> None:
  """Draws the smoothed loss of every run."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  jobs = report["jobs"]
  figure, axes = pyplot.subplots(
    1, len(jobs), figsize=(5.2 * len(jobs), 3.4), layout="constrained", squeeze=False
  )
  for axis, (name, records) in zip(axes[0], jobs.items(), strict=True):
    for record in records:
      smooth, value = [], record["losses"][0]
      for loss in record["losses"]:
        value = SMOOTH * value + (1 - SMOOTH) * loss
        smooth.append(value)
      coded = record["way"] == "int8"
      axis.plot(
        record["steps"],
        smooth,
        "--" if coded else "-",
        color=f"C{record['seed']}",
        linewidth=1.2,
        label=f"seed {record['seed']}, {record['way']}",
      )
    axis.set(title=name, xlabel="step", ylabel="loss, smoothed", yscale="log")
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3)
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--name", required=True, help="of the job, in the record")
  parser.add_argument("--recipe", required=True, help="FILE:OPTIONS of stage 2, without seed=")
  parser.add_argument("--seeds", type=int, default=3)
  parser.add_argument("--limit", type=int, default=0, help="only the first N questions (0: all)")
  parser.add_argument("--data", default="data/easy_vqa", help="folder of the test questions")
  parser.add_argument("--runs", default="runs/frozen_matmul", help="folder of the runs")
  parser.add_argument("--out", default="", help="write OUT.json, OUT.md and OUT.png")
  options = parser.parse_args()
  records = [trained(way, seed, options) for seed in range(options.seeds) for way in WAYS]
  for way in WAYS:
    print(f"{options.name}, {way}: {mean(records, way):.2f}%")
  if options.out:
    out = Path(options.out)
    jobs = provenance.read(out, {}).get("jobs", {})
    report = {"jobs": {**jobs, options.name: records}}
    provenance.write(out, report)
    provenance.named(out, "md").write_text(page(report, provenance.named(out, "png").name))
    picture(report, provenance.named(out, "png"))


if __name__ == "__main__":
  main()
