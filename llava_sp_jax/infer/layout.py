"""Defines the sizes of the engine's compiled programs and the bounds of its caches."""

from __future__ import annotations

import dataclasses

BETWEEN = 4  # growing sizes between two powers of two, so that a quarter is padding at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineLayout:
  """Holds the sizes that shapes are rounded up to, and the bounds of caches and of the queue."""

  prefix: int = 8  # shared positions of a prompt are padded to a multiple of this
  suffix: int = 16  # the other positions of a prompt, likewise
  capacity: int = 64  # positions in a row of the KV cache, likewise
  groups: int = 4  # a group to prefill has 1, this, this squared .. rows of each part of a mesh
  window: int = 1024  # requests that are read ahead and may be answered in another order
  feature_bytes: int = 2 << 30  # bound of the feature cache
  prefix_bytes: int = 1 << 30  # bound of the prefix cache
  tiles: int = 1  # that the tower encodes at a time, for each data-parallel group
  share: bool = True  # False: prompts share nothing
  new_tokens: int = 0  # room for an answer; 0: what the engine's own settings allow
  log_probabilities: int | None = None  # that requests may ask for; None: what the engine's own do
  pictures: int = 65536  # pictures whose sizes are remembered
  positions: int = 0  # most of a prompt and its answer; 0: the model's
  growing: bool = False  # larger sizes lie further apart, so that few programs serve any length

  def rounded(self, length: int, multiple: int) -> int:
    """Returns `length` rounded up to a size that programs are compiled for.

    Args:
      length: number of positions.
      multiple: `prefix`, `suffix` or `capacity` of this layout.
    """
    exact = bucket(length, multiple)
    if not self.growing or not exact:
      return exact
    count = exact // multiple
    step = max(1, (1 << count.bit_length() - 1) // BETWEEN)
    most = bucket(self.positions, multiple) if self.positions else bucket(count, step) * multiple
    return max(exact, min(bucket(count, step) * multiple, most))


def bucket(length: int, multiple: int) -> int:
  """Rounds `length` up to a multiple, so that prompts of similar length share a program."""
  return -(-length // multiple) * multiple


ROUNDED = EngineLayout()
