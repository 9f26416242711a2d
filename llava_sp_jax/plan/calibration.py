"""Compares predicted steps with published ones of the same sizes, and gives each prediction a band.

The published steps are those of MaxText: dense decoders, trained in bfloat16 with AdamW. Predicted is
this package's train step on as many chips, with a decoder of the same sizes, rows, mesh and about the
same recomputation, and a tower too small to matter. So a ratio holds what the prediction leaves out,
and how much faster or slower than MaxText's this package's program is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llava_sp_jax.plan.topologies import Topology

TREE = "https://github.com/AI-Hypercomputer"
V1 = f"{TREE}/maxtext/blob/76bd53b0f44caf989c88189afadeb1062f9254f0/MaxText/configs"
TIERS = (
  f"{TREE}/maxtext/blob/20a91e12a17cbaa7b786ac388b192b63392cd855/docs/reference/models/tiering.md"
)
RECIPES = f"{TREE}/tpu-recipes/blob/main/training/trillium"


@dataclasses.dataclass(frozen=True)
class Run:
  """Holds a published training step, and what `plan` predicts for one of the same sizes."""

  slice_name: str
  decoder: str
  rows: int  # of a chip
  length: int  # tokens of a row
  published: float  # tokens per second and chip
  predicted: float  # the same, by the fast predictor
  source: str  # of the published figure

  @property
  def ratio(self) -> float:
    """Returns how many times longer than predicted the published step took."""
    return self.predicted / self.published


# Where a source gives TFLOP/s of a chip, tokens/s are by MaxText's count then: 6 FLOPs for each
# parameter that multiplies, and attention on the whole square.
RUNS: dict[str, tuple[Run, ...]] = {
  "v5e": (
    Run("v5e-256", "16B", 6, 2048, 1192.0, 1377.0, f"{V1}/v5e/README.md"),
    Run("v5e-256", "32B", 4, 2048, 677.0, 716.0, f"{V1}/v5e/README.md"),
  ),
  "v5p": (  # the rows are those of its recipe, MaxText/configs/v5p/llama2_70b.sh
    Run("v5p-1024", "Llama 2 70B", 4, 4096, 692.0, 770.0, TIERS),
  ),
  "v6e": (
    Run("v6e-256", "Llama 3.1 8B", 4, 8192, 7207.0, 10061.0, f"{RECIPES}/Llama3.1-8B-MaxText/v6e-256/README.md"),
    Run("v6e-256", "Llama 2 70B", 3, 4096, 905.0, 1389.0, f"{RECIPES}/Llama2-70B-MaxText/README.md"),
  ),
}  # fmt: skip


def table() -> str:
  """Returns the runs as a table in markdown."""
  lines = [
    "| slice | decoder | rows of a chip | of | tokens/s of a chip, published | predicted | ratio |",
    "|---|---|---|---|---|---|---|",
  ]
  for run in (run for runs in RUNS.values() for run in runs):
    lines.append(
      f"| {run.slice_name} | {run.decoder} | {run.rows} | {run.length} | "
      f"[{run.published:,.0f}]({run.source}) | {run.predicted:,.0f} | {run.ratio:.2f} |"
    )
  return "\n".join(lines) + "\n"


def band(topology: Topology, seconds: float) -> tuple[float, float] | None:
  """Returns the least and the most seconds of a step by the published runs on a chip.

  `seconds` is what is predicted for it. Returns None for a chip without published runs.
  """
  ratios = [run.ratio for run in RUNS.get(topology.chip_name, ())]
  return (seconds * min(ratios), seconds * max(ratios)) if ratios else None


def text(seconds: Sequence[float]) -> str:
  """Returns a band as text, such as "1.1 - 1.3"; one number for a single run."""
  return " - ".join(dict.fromkeys(f"{value:.3g}" for value in seconds))
