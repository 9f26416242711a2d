"""Counts what an engine has done, for reports and tests."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Counts:
  """Counts requests, images, computed and reused parts, steps and tokens of an engine."""

  requests: int = 0  # answered, or answered with an error
  errors: int = 0  # requests answered with an error
  images_asked: int = 0  # images of all requests
  distinct_images: int = 0  # by path or content; those that could be read
  encoder_calls: int = 0  # images computed by the vision tower
  prefills: int = 0  # prefixes computed
  prefix_hits: int = 0  # prefixes reused from an earlier request
  admitted: int = 0  # requests put into a row
  decode_steps: int = 0  # steps; each is for all rows
  new_tokens: int = 0  # tokens of answers
  compiles: int = 0  # programs built

  @property
  def encoder_ratio(self) -> float:
    """Returns encoder calls divided by distinct images; 1 if there were no images.

    It is above 1 only if features were dropped from the cache for lack of memory.
    """
    return self.encoder_calls / self.distinct_images if self.distinct_images else 1.0

  def __str__(self) -> str:
    return (
      f"{self.requests} requests ({self.errors} errors), {self.images_asked} images asked, "
      f"{self.distinct_images} distinct, encoder calls / distinct images = {self.encoder_ratio:.2f}; "
      f"{self.prefills} prefixes computed, {self.prefix_hits} reused; {self.new_tokens} tokens in "
      f"{self.decode_steps} steps; {self.compiles} programs compiled"
    )
