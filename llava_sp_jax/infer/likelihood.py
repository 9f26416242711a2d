"""Computes how likely a given answer is, and whether greedy decoding would write it.

Shape letters:  B rows . T row length . K tokens of the longest continuation
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int, Shaped

from llava_sp_jax.data import anyres, conversation, example, reading
from llava_sp_jax.infer.counts import Counts
from llava_sp_jax.infer.decode import Sampling, StopRule
from llava_sp_jax.infer.pretrained import Pretrained, padded_from
from llava_sp_jax.infer.programs import Programs
from llava_sp_jax.infer.requests import Request, tiles_of
from llava_sp_jax.models import build

Asked = tuple[list[example.Run], list[anyres.Picture]]
LENGTHS, CONTINUATIONS = 64, 16  # T and K are rounded up to multiples of these


class Likelihood:
  """Computes log-probabilities of given answers.

  Each combination of T, K and the number of tiles is compiled once.
  """

  def __init__(self, pretrained: Pretrained, batch_size: int = 8, programs: Programs | None = None):
    """Prepares a model.

    Args:
      pretrained: config, parameters and tokenizer.
      batch_size: rows of a batch.
      programs: the compiled programs of an engine of the same model, whose parameters are used;
        None makes new ones on the first device.
    """
    self._tokenizer, self._batch_size = pretrained.tokenizer, batch_size
    config = pretrained.config
    self._template = conversation.TEMPLATES[config.data.template]
    self._reader = anyres.Reader(config.data, anyres.Tile(*build.tile_shape(config.model)))
    logits = config.model.language_model.vocab_size
    rule = StopRule((), 0, logits, vocabulary=padded_from(pretrained))
    self._programs = programs or Programs(
      config, pretrained.params, Sampling(rule), mesh=None, counts=Counts()
    )

  def __call__(self, asked: Iterable[tuple[Request, str]]) -> Iterator[tuple[float, bool]]:
    """Yields two values for each (request, continuation), in the order of the requests.

    The first is the sum of the log-probabilities of the continuation's tokens (natural logarithm).
    The second is whether greedy decoding chooses each of them. The continuation is tokenized as an
    answer is in training: after the blank of the template, without a blank of its own. The end
    token is not part of it.

    Raises: SampleError for an image that cannot be read, or a row that has no room for all images.
    """
    read = (self._read(request, continuation) for request, continuation in asked)
    while chunk := list(itertools.islice(read, self._batch_size)):
      batch, places = self._batch(chunk)
      at = np.zeros((self._batch_size, _up(max(map(len, places)), CONTINUATIONS)), np.int32)
      for i, mine in enumerate(places):
        at[i, : len(mine)] = mine
      found, most_likely = self._programs.score(batch, at)
      for i, mine in enumerate(places):
        used = slice(len(mine))
        yield float(found[i, used].sum(dtype=np.float64)), bool(most_likely[i, used].all())

  def _read(self, request: Request, continuation: str) -> Asked:
    pictures = [tiles_of(picture, self._reader) for picture in request.images]
    runs = reading.question(
      request.question,
      len(pictures),
      self._template,
      self._tokenizer,
      request.system,
      continuation,
      request.history,
    )
    return runs, pictures

  def _batch(
    self, chunk: list[Asked]
  ) -> tuple[dict[str, Shaped[np.ndarray, "B ..."]], list[Int[np.ndarray, " K"]]]:
    """Returns a full batch, and for each continuation the positions before its tokens."""
    tiles = max(1, max(sum(p.plan.tiles for p in pictures) for _, pictures in chunk))
    length = _up(max(_length(*asked) for asked in chunk), LENGTHS)
    rows = []
    for runs, pictures in chunk:
      row = example.layout(runs, [p.plan for p in pictures], length, tiles)
      pixels = np.zeros((tiles, *[self._reader.tile.size] * 2, 3), np.float32)
      if pictures:
        stacked = np.concatenate([p.tiles for p in pictures])
        pixels[: len(stacked)] = stacked
      rows.append({**row.arrays(), "images": pixels})
    counts = [sum(runs[-1].supervised) for runs, _ in chunk]  # replies before it do not count
    places = [
      np.flatnonzero(row["weights"])[-count or len(row["weights"]) :]
      for row, count in zip(rows, counts, strict=True)
    ]
    rows += [rows[-1]] * (self._batch_size - len(rows))
    names = ("tokens", "positions", "segments", "slots", "targets", "images")
    return {name: np.stack([row[name] for row in rows]) for name in names}, places


def _length(runs: list[example.Run], pictures: list[anyres.Picture]) -> int:
  return sum(len(run.ids) for run in runs) + sum(len(p.plan.slots) - 1 for p in pictures)


def _up(count: int, step: int) -> int:
  return -(-max(count, 1) // step) * step
