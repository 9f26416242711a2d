"""Models the lengths of `llava_v1_5_mix665k.json` without the file.

Counts come from the mixture's table in the LLaVA-1.5 paper (arXiv 2310.03744): 665K samples, of
which 40,688 have no image. Text lengths are estimates: the v1 prompt (35 tokens), 8 tokens around
each turn, and the paper's numbers of turns (all questions about a VQAv2 or GQA picture are one
dialogue; ten regions of Visual Genome, boxes as digits; one caption with OCR words), as
log-normals. An image is 576 patches and six spatial tokens. ShareGPT dialogues are cut at
`row_length`, as in the paper.
"""

from __future__ import annotations

import numpy as np

from llava_sp_jax.data.packing import Sizes

IMAGE = 582
GROUPS = (  # thousands of samples, mean and log-deviation of their text in tokens, images
  (57, 300, 0.30, 1),  # LLaVA-Instruct: conversations
  (23, 175, 0.25, 1),  # details
  (77, 215, 0.25, 1),  # reasoning
  (83, 142, 0.25, 1),  # VQAv2
  (72, 320, 0.35, 1),  # GQA
  (9, 75, 0.30, 1),  # OKVQA
  (80, 170, 0.25, 1),  # OCRVQA
  (66, 100, 0.20, 1),  # A-OKVQA
  (22, 130, 0.30, 1),  # TextCaps
  (48, 325, 0.50, 1),  # RefCOCO
  (86, 450, 0.40, 1),  # Visual Genome
  (41, 1000, 0.90, 0),  # ShareGPT
)
SHORTEST = 45  # the prompt and one word


def draw(count: int, seed: int = 0, row_length: int = 2048, shrink: int = 1) -> Sizes:
  """Draws sizes of `count` random samples; `shrink` divides all lengths, for small models."""
  rng = np.random.default_rng(seed)
  shares = np.array([group[0] for group in GROUPS], float)
  group = rng.choice(len(GROUPS), count, p=shares / shares.sum())
  _, mean, spread, tiles = np.array(GROUPS).T
  normal = rng.standard_normal(count) * spread[group]
  text = np.maximum(SHORTEST, mean[group] * np.exp(normal - spread[group] ** 2 / 2))
  lengths = (text + IMAGE * tiles[group]) // shrink
  lengths = np.minimum(lengths, row_length // shrink).astype(np.int32)
  return Sizes(lengths, tiles[group].astype(np.int32), np.arange(count, dtype=np.int32))
