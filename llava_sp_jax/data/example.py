"""Builds one row of a batch: token ids, targets, and the slot of every image token.

Shape letters:  T row length . M tiles per row . N tokens per tile . L tokens of one image
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_sp_jax.batch import BRANCHES, TOKENS
from llava_sp_jax.data.failure import SampleError

IMAGE_ID = -200  # stands for a whole image in a list of ids, as in LLaVA's data
NEWLINE = -2  # in a plan: the learned token at the end of a row of patches


@dataclasses.dataclass(frozen=True)
class Run:
  """Holds consecutive ids of one branch; `supervised` marks the ids that count in the loss."""

  ids: tuple[int, ...]
  supervised: tuple[bool, ...]
  branch: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class TokenPlan:
  """Holds the tokens of one image in the order in which the decoder reads them."""

  slots: np.ndarray  # [L] int32; token n of the image's tile t is t * N + n, or NEWLINE
  tiles: int
  tile_tokens: int  # N, the same for every tile of a model


def one_tile(tokens: int) -> TokenPlan:
  """Returns the plan of an image of one tile, whose `tokens` tokens keep their order."""
  return TokenPlan(np.arange(tokens, dtype=np.int32), 1, tokens)


@dataclasses.dataclass(frozen=True)
class TokenRow:
  """Holds one row of a batch: arrays [T], int32 except `weights` (float32)."""

  tokens: np.ndarray
  targets: np.ndarray
  weights: np.ndarray
  positions: np.ndarray
  segments: np.ndarray
  slots: np.ndarray
  length: int  # tokens of the row without padding, after truncation

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns {name in a batch: array}, without `length`."""
    return {name: getattr(self, name) for name in TOKENS}


def total_length(
  runs: list[Run], plans: Sequence[TokenPlan], row_length: int, row_tiles: int = 0
) -> int:
  """Returns the number of tokens of a sample before truncation, without building its row.

  `row_tiles` is the number of tiles for which a row has space (0: unlimited).

  Raises: SampleError when the number of IMAGE_ID in the ids is not the number of plans, the images
    have more tiles than a row has space for, or truncation would cut an image.
  """
  tiles = sum(plan.tiles for plan in plans)
  if row_tiles and tiles > row_tiles:
    cut = f" of {tiles} tiles" if tiles > len(plans) else ""
    raise SampleError(f"{len(plans)} images{cut}, but data.images_per_row is {row_tiles}")
  named = sum(run.ids.count(IMAGE_ID) for run in runs)
  if named != len(plans):
    raise SampleError(f"the text has {named} <image> but the sample has {len(plans)} images")
  total, counts = 0, iter(len(plan.slots) for plan in plans)
  for run in runs:
    for token in run.ids:
      count = next(counts) if token == IMAGE_ID else 1
      total += count
      if token == IMAGE_ID and total > row_length:
        raise SampleError(
          f"an image of {count} tokens does not fit into rows of {row_length} behind "
          f"{total - count} tokens"
        )
  return total


def layout(
  runs: list[Run],
  plans: Sequence[TokenPlan],
  row_length: int,
  row_tiles: int = 0,
  segment: int = 1,
  first_tile: int = 0,
) -> TokenRow:
  """Builds the row of a sample: replaces each IMAGE_ID by the slots of its plan, pads, truncates.

  Positions of every branch continue those of the trunk, as if no other branch were there.

  Args:
    runs: ids of the sample, with IMAGE_ID for an image.
    plans: token plans of the images, in their order in the ids.
    row_length: T.
    row_tiles: M, the tiles for which a row has space (0: exactly those of the plans). NEWLINE
      becomes slot M * N.
    segment: the number of the sample within its row, from 1.
    first_tile: the index, within its row, of the sample's first tile.

  Raises: SampleError when ids and images do not match, or the row has no room for the images.
  """
  total = total_length(runs, plans, row_length, row_tiles)
  places = iter(_places(plans, row_tiles, first_tile))
  ids: list[int] = []
  supervised: list[bool] = []
  slots: list[int] = []
  positions: list[int] = []
  segments: list[int] = []
  ends = {0: 0}
  for run in runs:
    at = ends.setdefault(run.branch, ends[0])
    for token, counts in zip(run.ids, run.supervised, strict=True):
      taken = next(places) if token == IMAGE_ID else [-1]
      count = len(taken)
      slots += taken
      ids += [max(token, 0)] * count
      supervised += [counts and token != IMAGE_ID] * count
      positions += range(at, at + count)
      segments += [segment * BRANCHES + run.branch] * count
      at += count
    ends[run.branch] = at
  row: dict[str, list[Any]] = {
    "tokens": ids,
    "positions": positions,
    "segments": segments,
    "slots": slots,
    "targets": [*ids[1:], 0],
    "weights": [*supervised[1:], False],
  }
  arrays = {}
  for name, values in row.items():
    array = np.full(row_length, TOKENS[name].padding, TOKENS[name].dtype)
    array[: min(total, row_length)] = values[:row_length]
    arrays[name] = array
  if total > row_length:
    arrays["weights"][-1] = 0.0  # the target was cut off
  return TokenRow(length=min(total, row_length), **arrays)


def _places(plans: Sequence[TokenPlan], row_tiles: int, first: int) -> list[list[int]]:
  """Returns the slots of each image within its row."""
  result, room = [], row_tiles or first + sum(plan.tiles for plan in plans)
  for plan in plans:
    newline = room * plan.tile_tokens
    moved = plan.slots + first * plan.tile_tokens
    result.append(np.where(plan.slots == NEWLINE, newline, moved).tolist())
    first += plan.tiles
  return result


def join(rows: Sequence[TokenRow], row_length: int) -> TokenRow:
  """Concatenates rows without their padding and pads the result to `row_length`.

  The rows must have distinct segments and slots already. Raises: ValueError when they are too long.
  """
  used = sum(row.length for row in rows)
  if used > row_length:
    raise ValueError(f"rows of {used} tokens do not fit into one of {row_length}")
  arrays = {}
  for name, array in TOKENS.items():
    fill = np.full(row_length - used, array.padding, array.dtype)
    parts = [getattr(row, name)[: row.length] for row in rows]
    arrays[name] = np.concatenate([*parts, fill])
  return TokenRow(length=used, **arrays)


def from_labels(ids: list[int], labels: list[int], ignore: int = -100) -> list[Run]:
  """Converts LLaVA's arrays to runs: ids with IMAGE_ID, and labels that are `ignore` in context."""
  return [Run(tuple(ids), tuple(label != ignore for label in labels))]
