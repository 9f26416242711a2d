"""One row of a batch: token ids, targets, and where every image token goes.

Shape letters:  T row length . M images per row . N tokens per image
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from llava_sp_jax.data.conversation import IMAGE, Piece, SampleError
from llava_sp_jax.data.tokenizer import Tokenizer

BRANCHES = 1 << 12  # as `models.layers.BRANCHES`; a test holds the two together
IMAGE_ID = -200  # stands for a whole image in a list of ids, as in LLaVA's data


@dataclasses.dataclass(frozen=True)
class Run:
  """Consecutive ids of one branch; `learn` marks the ids that are predicted."""

  ids: tuple[int, ...]
  learn: tuple[bool, ...]
  branch: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
  """Arrays of length T, int32 but for `weights` (float32); a batch stacks them."""

  tokens: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  positions: np.ndarray
  segments: np.ndarray
  slots: np.ndarray
  length: int  # of the row before padding, truncation included

  def arrays(self) -> dict[str, np.ndarray]:
    names = ("tokens", "targets", "weights", "positions", "segments", "slots")
    return {name: getattr(self, name) for name in names}


def tokenize(pieces: list[Piece], tokenizer: Tokenizer) -> list[Run]:
  """Ids of each piece; `<image>` becomes IMAGE_ID; text around it is tokenised on its own."""
  runs = []
  if tokenizer.bos_id is not None:
    runs.append(Run((tokenizer.bos_id,), (False,)))
  for piece in pieces:
    ids: list[int] = []
    for i, text in enumerate(piece.text.split(IMAGE)):
      ids += [IMAGE_ID] if i else []
      ids += tokenizer.encode(text) if text else ()
    runs.append(Run(tuple(ids), (piece.learn,) * len(ids), piece.branch))
  return runs


def layout(
  runs: list[Run], image_tokens: int, row_length: int, images: int, segment: int = 1
) -> Row:
  """Lays runs out in a row: an image becomes `image_tokens` slots, what is too long is cut off.

  A branch continues the positions of the trunk, so it reads as if it alone followed it.

  Raises:
    SampleError: when the ids name another number of images than the sample has, or an image would
      be cut.
  """
  ids: list[int] = []
  learn: list[bool] = []
  slots: list[int] = []
  positions: list[int] = []
  segments: list[int] = []
  seen, ends = 0, {0: 0}
  for run in runs:
    at = ends.setdefault(run.branch, ends[0])
    for token, learned in zip(run.ids, run.learn, strict=True):
      count = image_tokens if token == IMAGE_ID else 1
      if token == IMAGE_ID:
        slots += range(seen * image_tokens, (seen + 1) * image_tokens)
        seen += 1
        if len(ids) + count > row_length:
          raise SampleError(f"an image of {count} tokens does not fit into rows of {row_length}")
      else:
        slots.append(-1)
      ids += [max(token, 0)] * count
      learn += [learned and token != IMAGE_ID] * count
      positions += range(at, at + count)
      segments += [segment * BRANCHES + run.branch] * count
      at += count
    ends[run.branch] = at
  if seen != images:
    raise SampleError(f"the text has {seen} <image> but the sample has {images} images")
  total = len(ids)
  row: dict[str, list[Any]] = {
    "tokens": ids, "positions": positions, "segments": segments, "slots": slots,
    "targets": [*ids[1:], 0], "weights": [*learn[1:], False],
  }  # fmt: skip
  fill = {"slots": -1}
  arrays = {}
  for name, values in row.items():
    array = np.full(row_length, fill.get(name, 0), np.float32 if name == "weights" else np.int32)
    array[: min(total, row_length)] = values[:row_length]
    arrays[name] = array
  if total > row_length:
    arrays["weights"][-1] = 0.0  # its target was cut off
  return Row(length=min(total, row_length), **arrays)


def from_labels(ids: list[int], labels: list[int], ignore: int = -100) -> list[Run]:
  """A run from LLaVA's own arrays: ids with IMAGE_ID, labels that are `ignore` in the context."""
  return [Run(tuple(ids), tuple(label != ignore for label in labels))]
