"""Turns a sample into runs of ids, and computes its size without decoding its images.

Random draws for a sample depend on the seed, the epoch and the sample's index alone, so they are
the same in any row and on any host.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from llava_sp_jax import config as config_lib
from llava_sp_jax.config import lookup
from llava_sp_jax.data import anyres, conversation, example, forms, reading
from llava_sp_jax.data.conversation import Turns
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SampleSize:
  """Holds the size of a sample."""

  length: int  # tokens in a row
  total: int  # tokens before truncation
  tiles: int


def rng_of(seed: int, epoch: int, index: int) -> np.random.Generator:
  """Returns the random generator of sample `index` in an epoch; it depends on nothing else."""
  return np.random.default_rng([seed, epoch, index])


class SampleEncoder:
  """Turns samples into runs of ids, and computes their size."""

  def __init__(self, tokenizer: Tokenizer, data: config_lib.DataConfig):
    """Looks up the template and the other settings of `data`.

    Raises: ConfigError for one that does not exist.
    """
    self._tokenizer, self._data = tokenizer, data
    self._template = lookup("data.template", data.template, conversation.TEMPLATES)
    lookup("data.turns", data.turns, conversation.TURNS)
    self._shorten = lookup("data.too_long", data.too_long, TOO_LONG)

  def runs(self, sample: Any, rng: np.random.Generator) -> list[example.Run]:
    """Tokenizes a sample; draws turns with `rng` first if it has more than `data.turns_per_row`.

    Raises: SampleError for a sample that cannot be used.
    """
    dialogue = forms.read(sample)
    turns, limit = dialogue.turns, self._data.turns_per_row
    if limit and len(turns) > limit:
      turns = draw_turns(turns, limit, rng)
    layout = self._data.turns
    return reading.dialogue(turns, self._template, layout, self._tokenizer, dialogue.system)

  def size(self, runs: list[example.Run], plans: Sequence[example.TokenPlan]) -> SampleSize:
    """Returns the size of a sample from its runs of ids and the token plans of its images.

    Raises: SampleError when it fits into no row, or is too long and may not be truncated.
    """
    limit = self._data.row_length
    total = example.total_length(runs, plans, limit, self._data.images_per_row)
    length = self._shorten(total, limit) if total > limit else total
    return SampleSize(length, total, sum(plan.tiles for plan in plans))


def _cut(total: int, limit: int) -> int:
  return limit


def _refused(total: int, limit: int) -> int:
  raise SampleError(f"{total} tokens, but data.row_length is {limit} and data.too_long quarantine")


TOO_LONG = {"cut": _cut, "quarantine": _refused}


def draw_turns(turns: Turns, limit: int, rng: np.random.Generator) -> Turns:
  """Draws `limit` turns at random, keeps their order, and puts the images into the first of them.

  Several images keep their places within the text of the first turn if it is drawn. Otherwise image
  marks are put in front of the first turn that is drawn.

  Raises: SampleError for an image mark in a later turn, which might not be drawn.
  """
  if any(conversation.IMAGE in question for question, _ in turns[1:]):
    raise SampleError("data.turns_per_row draws turns, so images must stand in the first turn")
  image_count = turns[0][0].count(conversation.IMAGE)
  plain = [(q.replace(conversation.IMAGE, "").strip(), a) for q, a in turns]
  places = sorted(rng.choice(len(turns), limit, replace=False))
  chosen = [plain[i] for i in places]
  if places[0] == 0 and image_count > 1:
    return [turns[0], *chosen[1:]]
  first = (conversation.IMAGE + "\n") * image_count + chosen[0][0]
  return [(first, chosen[0][1]), *chosen[1:]]


class Measurer:
  """Computes the size of a sample from its text and the headers of its image files."""

  def __init__(self, writer: SampleEncoder, reader: anyres.Reader, sizes: Any, seed: int):
    """Stores its arguments.

    Args:
      writer: tokenizes samples.
      reader: plans the tokens of images.
      sizes: reads the sizes of a sample's images, a method of its `source.Source`.
      seed: the seed of the run, with which turns are drawn.
    """
    self._writer, self._reader, self._sizes, self._seed = writer, reader, sizes, seed

  def __call__(self, sample: Any, epoch: int, index: int) -> SampleSize:
    """Returns the size of a sample, whose turns are drawn by epoch and index.

    Raises: SampleError for a sample that cannot be used.
    """
    runs = self._writer.runs(sample, rng_of(self._seed, epoch, index))
    return self._writer.size(runs, [self._reader.plan(size) for size in self._sizes(sample)])
