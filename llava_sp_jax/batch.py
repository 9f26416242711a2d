"""Defines the wire format of a batch: names, dtypes, padding, and segment ids.

The host makes these arrays, and the device reads them. All shapes are static.

Shape letters:  B rows . T row length . M tiles of a row . H,W pixels
"""

from __future__ import annotations

import dataclasses

# Segment ids say which positions see each other. 0 is padding. Sample n owns the ids n*BRANCHES ..
# n*BRANCHES + BRANCHES-1. The first is its trunk, which all its branches see. Branches do not see
# each other.
BRANCHES = 1 << 12


@dataclasses.dataclass(frozen=True)
class Array:
  """Describes an array [B, T] of a batch: dtype, and the value at positions of padding."""

  dtype: str = "int32"
  padding: int = 0


# Arrays of token positions, [B, T], by name.
TOKENS: dict[str, Array] = {
  "tokens": Array(),  # ids; 0 at image tokens
  "targets": Array(),  # the next id
  "weights": Array("float32"),  # of the target in the loss
  "positions": Array(),  # within the sample; branches continue the positions of the trunk
  "segments": Array(),  # see BRANCHES
  "slots": Array(padding=-1),  # index of an image token within the row, -1 for text
}
IMAGES = "images"  # [B, M, H, W, 3] float32: preprocessed tiles, zeros where a row has fewer
