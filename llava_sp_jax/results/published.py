"""Quotes figures that others published, for comparison; none of them was measured here."""

from __future__ import annotations

from llava_sp_jax.results.scores import BenchmarkScores

# LLaVA's docs/MODEL_ZOO.md, table "LLaVA-v1.5", schedule lora-1e. MME is the perception score.
SOURCE = "LLaVA's docs/MODEL_ZOO.md, LLaVA-v1.5, schedule lora-1e (liuhaotian/llava-v1.5-*-lora)"
MODELS = ("LLaVA-1.5 7B LoRA", "LLaVA-1.5 13B LoRA")

# Only figures that could be read at their source are quoted, so those of the LLaVA-SP paper are
# missing. A row is for one protocol and split (SEED: images and videos), in the unit of its source.
FIGURES: dict[tuple[str, ...], tuple[float, float]] = {  # (task, protocol, split) -> as in MODELS
  ("vqav2", "llava"): (79.1, 80.0),
  ("gqa", "llava"): (63.0, 63.3),
  ("vizwiz", "llava"): (47.8, 58.9),
  ("scienceqa", "llava"): (68.4, 71.2),
  ("textvqa", "llava"): (58.2, 60.2),
  ("pope", "llava"): (86.4, 86.7),
  ("mme", "llava"): (1476.9, 1541.7),
  ("mmbench", "llava", "mmbench_dev_20230712"): (66.1, 68.5),
  ("mmbench_cn", "llava", "mmbench_dev_cn_20231003"): (58.9, 61.5),
  ("seed", "llava", "all"): (60.1, 61.3),
  ("llava_bench", "llava"): (67.9, 69.5),
  ("mmvet", "llava"): (30.2, 38.3),
}


def beside(scores: BenchmarkScores) -> list[tuple[str, float]]:
  """Returns (model, published figure) pairs of the same task, protocol and split as the scores.

  Returns [] if there are none, or the scores are not over all questions.
  """
  if scores.asked < scores.questions:
    return []
  figures = FIGURES.get((scores.task, *scores.variant.values()))
  return list(zip(MODELS, figures, strict=True)) if figures else []
