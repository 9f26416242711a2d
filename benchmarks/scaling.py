"""Predicts how a 7B training step scales to 2,048 chips and to 8 slices.

Usage: python benchmarks/scaling.py [--only weak-v5e] [--out docs/results/scaling]

Weak: rows grow with the chips. Strong: the same rows for all. A point compiles the real train step for
the chips, as `llava-sp plan` does (a minute each; needs libtpu), and is kept at once.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from llava_sp_jax import provenance
from llava_sp_jax.hardware import GIB
from llava_sp_jax.plan import compile as compile_lib
from llava_sp_jax.plan import report, topologies
from llava_sp_jax.tools import plan as plan_tool

RECIPE = "configs/finetune_lora.py:init="
LENGTH = 2048


@dataclasses.dataclass(frozen=True)
class Series:
  """Describes points that are compared: slices from small to large, and the rows of each."""

  slices: tuple[str, ...]
  rows: tuple[int, ...]
  fsdp: tuple[int, ...]  # chips over which a parameter is divided; more of them hold copies
  micro: int  # rows of a chip in a micro-batch
  base: str


SERIES = {
  "weak-v5e": Series(
    ("v5e-16", "v5e-64", "v5e-256", "v5e-256x2", "v5e-256x4", "v5e-256x8"),
    (32, 128, 512, 1024, 2048, 4096),
    (16, 64, 256, 256, 256, 256),
    1,
    "replicate_tower",
  ),
  "weak-v5p": Series(
    ("v5p-128", "v5p-512", "v5p-1024", "v5p-2048", "v5p-4096"),
    (128, 512, 1024, 2048, 4096),
    (64, 256, 512, 1024, 2048),
    2,
    "replicate",
  ),
  "strong-v5e": Series(
    ("v5e-64", "v5e-128", "v5e-256", "v5e-256x2", "v5e-256x4", "v5e-256x8"),
    (2048,) * 6,
    (64, 128, 256, 256, 256, 256),
    1,
    "replicate_tower",
  ),
  "strong-v5p": Series(
    ("v5p-128", "v5p-256", "v5p-512", "v5p-1024", "v5p-2048", "v5p-4096"),
    (2048,) * 6,
    (64, 128, 256, 512, 1024, 2048),
    2,
    "replicate",
  ),
}


def point(series: Series, name: str, rows: int, fsdp: int) -> dict[str, Any]:
  """Returns the prediction for one slice, or several."""
  topology = topologies.topology(name)
  micro = min(series.micro * topology.chips, rows)
  settings = {
    "train.batch_size": rows,
    "train.accumulate": rows // micro,
    "data.images_per_row": 3,
    "mesh.data": topology.chips // fsdp,
    "mesh.fsdp": fsdp,
    "mesh.base": series.base,
  }
  changed = [f"--config.{key}={value}" for key, value in settings.items()]
  _, config = plan_tool.read(["--config", RECIPE, "--topology", name, *changed])
  compiled = compile_lib.compile_config(config, topology, compile_lib.TRAIN)
  plan = report.make(config, topology, compile_lib.TRAIN, compiled)
  return {
    "chips": topology.chips,
    "slices": topology.slices,
    "rows": rows,
    "accumulate": settings["train.accumulate"],
    "mesh": plan.about["mesh"],
    "seconds": plan.seconds,
    "mfu": plan.mfu,
    "hbm_gib": plan.used / GIB,
    "fits": plan.fits,
    "chip_seconds_per_row": plan.seconds * topology.chips / rows,
    "compiler": compile_lib.compiler(topology),
  }


def page(record: dict[str, dict[str, Any]]) -> str:
  lines = [
    "# Scaling of a training step",
    "",
    f"LLaVA-SP 7B (cropping), LoRA, rows of {LENGTH} with three images. **Predicted, not measured**: each",
    "point compiles the real step for the chips (`python benchmarks/scaling.py`). *cost* is the chips'",
    "time for a row, against the first line of its table; 1.00 is perfect scaling.",
  ]
  for name, points in record.items():
    kind, chip = name.split("-")
    lines += [
      "",
      f"## {kind.capitalize()} scaling on {chip}",
      "",
      "| slices | chips | rows | micro-batches | mesh | s/step | MFU | HBM GiB | cost |",
      "|---|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(points.values()))["chip_seconds_per_row"]
    for slices, one in points.items():
      mesh = " x ".join(str(size) for size in one["mesh"].values())
      lines.append(
        f"| {slices} | {one['chips']:,} | {one['rows']:,} | {one['accumulate']} | {mesh} | "
        f"{one['seconds']:.4f} | {one['mfu']:.3f} | {one['hbm_gib']:.2f} | "
        f"{one['chip_seconds_per_row'] / first:.3f} |"
      )
  return "\n".join([*lines, "", "![cost of a row by chips](scaling.png)"]) + "\n"


def picture(record: dict[str, dict[str, Any]], path: Path) -> None:
  """Draws the cost of a row by the number of chips."""
  from matplotlib import pyplot

  figure, axis = pyplot.subplots(figsize=(7, 4))
  for name, points in record.items():
    ordered = sorted(points.values(), key=lambda one: one["chips"])
    costs = [one["chip_seconds_per_row"] / ordered[0]["chip_seconds_per_row"] for one in ordered]
    axis.plot([one["chips"] for one in ordered], costs, marker="o", label=name)
  axis.axhline(1.05, color="gray", linewidth=0.8, linestyle="--")
  axis.set_xscale("log", base=2)
  axis.set_xlabel("chips")
  axis.set_ylabel("predicted cost of a row, against the fewest chips")
  axis.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=110)
  pyplot.close(figure)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", choices=SERIES, help="one series (default: all)")
  parser.add_argument("--out", type=Path, default=Path("docs/results/scaling"))
  options = parser.parse_args()
  record: dict[str, dict[str, Any]] = provenance.read(options.out, {})
  for name in [options.only] if options.only else SERIES:
    series = SERIES[name]
    points: dict[str, Any] = {}
    for slices, rows, fsdp in zip(series.slices, series.rows, series.fsdp, strict=True):
      points[slices] = point(series, slices, rows, fsdp)
      print(name, slices, points[slices], flush=True)
      provenance.write(options.out, {**record, name: points}, beside=True)
    record = {**record, name: points}
  ordered = {name: record[name] for name in SERIES if name in record}
  provenance.named(options.out, "md").write_text(page(ordered))
  picture(ordered, provenance.named(options.out, "png"))
  print(page(ordered))


if __name__ == "__main__":
  main()
