"""Figures that others published, to stand beside ours; none of them was measured here."""

from __future__ import annotations

# LLaVA's docs/MODEL_ZOO.md, table "LLaVA-v1.5", schedule lora-1e. MME is the perception score.
SOURCE = "LLaVA's docs/MODEL_ZOO.md, LLaVA-v1.5, schedule lora-1e (liuhaotian/llava-v1.5-*-lora)"
MODELS = ("LLaVA-1.5 7B LoRA", "LLaVA-1.5 13B LoRA")

# The paper's own result table is not quoted: only what could be read at its source stands here.
FIGURES: dict[
  str, tuple[float, float]
] = {  # task: in the order of MODELS, in the unit of its table
  "vqav2": (79.1, 80.0),
  "gqa": (63.0, 63.3),
  "vizwiz": (47.8, 58.9),
  "scienceqa": (68.4, 71.2),
  "textvqa": (58.2, 60.2),
  "pope": (86.4, 86.7),
  "mme": (1476.9, 1541.7),
  "mmbench": (66.1, 68.5),
  "mmbench_cn": (58.9, 61.5),
  "seed": (60.1, 61.3),
  "llava_bench": (67.9, 69.5),
  "mmvet": (30.2, 38.3),
}


def beside(task: str) -> list[tuple[str, float]]:
  """(model, figure) for a task; [] where nothing was published."""
  return list(zip(MODELS, FIGURES[task], strict=True)) if task in FIGURES else []
