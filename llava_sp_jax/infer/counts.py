"""What an engine has done, in numbers that its promises are held against."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Counts:
  requests: int = 0  # answered, or answered with an error
  errors: int = 0  # of these
  images_asked: int = 0  # images of all requests
  distinct_images: int = 0  # by path or content; those that could be read
  encoder_calls: int = 0  # images that the vision tower has computed
  prefills: int = 0  # prefixes computed
  prefix_hits: int = 0  # prefixes taken over from an earlier request
  admitted: int = 0  # requests put into a row
  decode_steps: int = 0  # of all rows together
  new_tokens: int = 0  # of answers
  compiles: int = 0  # programs built

  @property
  def encoder_ratio(self) -> float:
    """Encoder calls for each distinct image: 1.00 unless features were dropped for memory."""
    return self.encoder_calls / self.distinct_images if self.distinct_images else 1.0

  def __str__(self) -> str:
    return (
      f"{self.requests} requests ({self.errors} errors), {self.images_asked} images asked, "
      f"{self.distinct_images} distinct, encoder calls / distinct images = {self.encoder_ratio:.2f}; "
      f"{self.prefills} prefixes computed, {self.prefix_hits} reused; {self.new_tokens} tokens in "
      f"{self.decode_steps} steps; {self.compiles} programs compiled"
    )
