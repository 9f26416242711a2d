"""Defines the settings of generation, which every score must state; imports no jax."""

from __future__ import annotations

import dataclasses
import math

MOST = 1 << 20  # the largest number of tokens or beams


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """Holds the settings of generation.

  It is greedy unless `temperature` > 0 (sampling) or `num_beams` > 1 (beam search).

  Raises: ValueError for an impossible setting; the message names it and the possible values.
  """

  max_new_tokens: int = 128
  temperature: float = 0.0
  top_k: int = 0  # 0: all tokens may be drawn
  top_p: float = 1.0  # 1: all tokens may be drawn
  num_beams: int = 1
  stop: tuple[str, ...] = ()  # an answer also ends before the first of these strings
  seed: int = 0  # of sampling

  def __post_init__(self) -> None:
    bounds = (
      ("max_new_tokens", 1 <= self.max_new_tokens <= MOST, f"from 1 to {MOST}"),
      ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
      ("top_k", 0 <= self.top_k <= MOST, f"0 (all) or more, at most {MOST}"),
      ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
      ("num_beams", 1 <= self.num_beams <= MOST, f"from 1 to {MOST}"),
      ("num_beams", self.num_beams == 1 or self.temperature == 0, "1 where temperature > 0"),
      ("stop", all(self.stop), "texts that are not empty"),
      ("seed", 0 <= self.seed < 1 << 32, f"0 to {(1 << 32) - 1}"),
    )
    for name, holds, expected in bounds:
      if not holds:
        raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)!r}")


DEFAULT = Generation()
