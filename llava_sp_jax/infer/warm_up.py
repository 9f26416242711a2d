"""Compiles an engine's programs before its first request."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterable

import numpy as np

from llava_sp_jax.infer.caches import Shared
from llava_sp_jax.infer.layout import EngineLayout
from llava_sp_jax.infer.requests import LostImageError
from llava_sp_jax.infer.rows import Rows
from llava_sp_jax.infer.schedule import Ready


def warm_up(rows: Rows, requests: Iterable[Ready], layout: EngineLayout) -> None:
  """Compiles the programs for requests that can be answered, in groups of every size."""
  kinds: dict[tuple[int, ...], Ready] = {}  # by what admitting them is compiled for
  shared: dict[tuple[int, ...], Shared] = {}  # and growing their prefixes
  starts: dict[tuple[int, int], int] = collections.defaultdict(int)  # the longest of a group
  lengths: dict[tuple[int, int], int] = collections.defaultdict(int)
  capacity = 0
  for ready in requests:
    assert ready.prompt is not None
    *before, last = ready.prompt.pieces
    group, length = rows.shape(ready), rows.suffix([ready.prompt])
    kinds.setdefault((*group, length), ready)
    for count in range(1, len(before) + 1):
      pieces = tuple(before[:count])
      shared.setdefault(rows.prefixes.shape(pieces), (ready.request, pieces))
    starts[group] = max(starts[group], last.start)
    lengths[group] = max(lengths[group], length)
    capacity = max(capacity, rows.capacity(ready, length))
  if not kinds:
    return
  # The prompt with the longest prefix may stand beside the one with the longest question.
  reach = max(starts[group] + lengths[group] for group in starts)
  rows.reserve(max(capacity, layout.rounded(reach, layout.capacity)))
  with contextlib.suppress(LostImageError):  # answering says so
    rows.prefixes.of(list(shared.values()))
  for ready in kinds.values():
    for size in rows.groups:
      with contextlib.suppress(LostImageError):
        rows.admit([ready] * size, rows.deal(range(rows.count))[:size])
  rows.decode(np.zeros(rows.count, bool), 1, rows.count + 1)
  if rows.logs:
    rows.logged(0, 0)
