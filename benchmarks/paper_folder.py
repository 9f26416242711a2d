"""Holds the sizes of the twelve benchmarks of the paper, and writes lines, documents and pictures of them."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORDS = tuple(
  word
  for line in (
    "what is the color of a man in this picture and how many people are on left right side near",
    "table holding red blue object behind it does there any which type animal kind street food made",
  )
  for word in line.split()
)
PICTURES, SIDE = 32, (640, 480)  # distinct files, and their size


@dataclasses.dataclass(frozen=True)
class Size:
  """Holds the size of a published test set."""

  questions: int
  images: int
  words: int  # of a question, about
  answer: int  # tokens of an answer with its end, about: a word, a letter, a text


# VQAv2 test-dev2015, GQA testdev-balanced, VizWiz test, ScienceQA test (2,017 with an image),
# TextVQA val, POPE of LLaVA's eval.zip, MME, MMBench dev (1,164 questions, asked again with their
# choices in other orders) and its Chinese version, SEED-Bench's images, LLaVA-Bench (in-the-wild), MM-Vet.
SIZES = {
  "vqav2": Size(107_394, 36_807, 6, 3),
  "gqa": Size(12_578, 398, 8, 3),
  "vizwiz": Size(8_000, 8_000, 7, 4),
  "scienceqa": Size(4_241, 2_017, 40, 2),
  "textvqa": Size(5_000, 3_166, 7, 5),
  "pope": Size(8_910, 500, 7, 2),
  "mme": Size(2_374, 1_187, 12, 2),
  "mmbench": Size(4_377, 1_164, 12, 2),
  "mmbench_cn": Size(4_329, 1_164, 12, 2),
  "seed": Size(14_233, 14_233, 12, 2),
  "llava_bench": Size(60, 24, 14, 160),
  "mmvet": Size(218, 200, 12, 60),
}


class Files:
  """Writes lines, documents and pictures below a root."""

  def __init__(self, root: Path, share: float):
    """Makes the pictures that all images are links to; `share` shrinks every number."""
    self.root, self._share = root, share
    self.rng = np.random.default_rng(0)
    store = root / "pictures"
    store.mkdir(parents=True, exist_ok=True)
    self._pictures = [store / f"{i}.jpg" for i in range(PICTURES)]
    for path in self._pictures:
      coarse = self.rng.integers(0, 256, (SIDE[1] // 16, SIDE[0] // 16, 3), dtype=np.uint8)
      Image.fromarray(coarse).resize(SIDE, Image.Resampling.BICUBIC).save(path, quality=90)

  def size(self, name: str) -> tuple[int, int]:
    """Returns the numbers of questions and images of a benchmark, at least two."""
    size = SIZES[name]
    questions = max(2, round(size.questions * self._share))
    return questions, min(questions, max(2, round(size.images * self._share)))

  def text(self, name: str) -> str:
    """Returns a random question of a benchmark."""
    count = max(3, round(self.rng.normal(SIZES[name].words, 2)))
    return " ".join(self.rng.choice(WORDS, count)) + "?"

  def images(self, folder: str, names: Iterable[str]) -> None:
    """Links images below a folder."""
    for i, name in enumerate(names):
      path = self.root / folder / name
      path.parent.mkdir(parents=True, exist_ok=True)
      path.unlink(missing_ok=True)
      os.link(self._pictures[i % PICTURES], path)

  def lines(self, name: str, rows: Iterable[Any]) -> None:
    """Writes a file of JSON lines."""
    path = self.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

  def whole(self, name: str, value: Any) -> None:
    """Writes a JSON document."""
    path = self.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))

  def encoded(self, index: int) -> str:
    """Returns a picture as base64; those of two indices differ in their last bytes."""
    content = self._pictures[index % PICTURES].read_bytes()
    return base64.b64encode(content + index.to_bytes(4, "big")).decode()
