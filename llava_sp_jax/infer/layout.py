"""Sizes of the engine's compiled programs and bounds of its caches."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineLayout:
  """Sizes that compiled shapes are rounded up to, and bounds of memory and of looking ahead."""

  prefix: int = 8  # positions that are shared, a multiple of this
  suffix: int = 16  # positions of a prompt's own, likewise
  capacity: int = 64  # positions of a row of the cache, likewise
  groups: int = 4  # sizes of groups that are prefilled together: 1, this, this squared .. B
  window: int = 1024  # requests that are taken ahead and may be answered in another order
  feature_bytes: int = 2 << 30  # of encoded images
  prefix_bytes: int = 1 << 30  # of keys and values
  tiles: int = 1  # of images at a time through the tower, for each part of the mesh's rows
  share: bool = True  # False: every prompt is computed whole


ROUNDED = EngineLayout()
