"""How likely a continuation is behind a prompt, and whether greedy decoding would write it.

Shape letters:  B rows . T row length . K tokens of the longest continuation . D width . V vocabulary
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from llava_sp_jax.data import anyres, conversation, example, image
from llava_sp_jax.infer.engine import Request
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.models import build

LENGTHS, CONTINUATIONS = 64, 16  # T and K are rounded up to multiples of these


class Likelihood:
  """Log-probabilities of given answers; each (T, K) is compiled once."""

  def __init__(self, pretrained: Pretrained, batch_size: int = 8):
    self._pretrained, self._batch_size = pretrained, batch_size
    config = pretrained.config
    self._template = conversation.TEMPLATES[config.data.template]
    self._reader = anyres.Reader(config.data, anyres.Tile(*build.tile_shape(config.model)))
    module = build.model(config.model)

    def score(params: Any, batch: dict[str, jax.Array], at: jax.Array) -> Any:
      """`at` [B, K]: positions before each token of the continuation. -> [B, K] twice."""
      variables = {"params": params}
      hidden: Any = module.apply(
        variables, batch["tokens"], batch["positions"], batch["segments"], batch["images"],
        batch["slots"],
      )  # fmt: skip
      picked = jnp.take_along_axis(hidden, at[..., None], axis=1)
      logits: Any = module.apply(variables, picked, method="logits")
      targets = jnp.take_along_axis(batch["targets"], at, axis=1)
      chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
      most_likely = jnp.argmax(logits, axis=-1) == targets
      return chosen - jax.nn.logsumexp(logits, axis=-1), most_likely

    self._score = jax.jit(score)

  def __call__(self, asked: Iterable[tuple[Request, str]]) -> Iterator[tuple[float, bool]]:
    """(sum of the continuation's log-probabilities, whether each token is the most likely one).

    The continuation is tokenised as an answer of training is, behind the template's own blank; the
    end of the answer is not part of it. In the order of the requests.

    Raises: SampleError for an image that cannot be read, or a row that has no room for all images.
    """
    rows = (self._row(request, continuation) for request, continuation in asked)
    while chunk := list(itertools.islice(rows, self._batch_size)):
      yield from self._run(chunk)

  def _row(self, request: Request, continuation: str) -> dict[str, np.ndarray]:
    side, room = self._reader.tile.size, self._reader.max_tiles
    pictures = [self._reader(_decoded(picture)) for picture in request.images]
    room *= max(1, len(pictures))
    pixels, first = np.zeros((room, side, side, 3), np.float32), 0
    for picture in pictures:
      pixels[first : first + picture.plan.tiles] = picture.tiles
      first += picture.plan.tiles
    question = request.question
    if request.images and conversation.IMAGE not in question:
      question = f"{conversation.IMAGE}\n" * len(request.images) + question
    answer = self._template.answer + continuation.removeprefix(self._template.answer)
    pieces = [
      *conversation.prompt(question, self._template), conversation.Piece(answer, True, 0)
    ]  # fmt: skip
    runs = example.tokenize(pieces, self._pretrained.tokenizer)
    plans = [picture.plan for picture in pictures]
    length = sum(len(run.ids) for run in runs) + sum(len(p.slots) - 1 for p in plans)
    row = example.layout(runs, plans, _up(length, LENGTHS), room)
    return {**row.arrays(), "images": pixels}

  def _run(self, rows: list[dict[str, np.ndarray]]) -> Iterator[tuple[float, bool]]:
    rows_at = [np.flatnonzero(row["weights"]) for row in rows]
    length = max(len(row["tokens"]) for row in rows)
    tiles = max(len(row["images"]) for row in rows)
    at = np.zeros((self._batch_size, _up(max(map(len, rows_at)), CONTINUATIONS)), np.int32)
    for i, places in enumerate(rows_at):
      at[i, : len(places)] = places
    batch = {}
    for name in ("tokens", "positions", "segments", "slots", "targets", "images"):
      fill, size = (-1 if name == "slots" else 0), (tiles if name == "images" else length)
      padded = [_padded(row[name], size, fill) for row in rows]
      padded += [padded[-1]] * (self._batch_size - len(rows))  # always the compiled size
      batch[name] = np.stack(padded)
    found, most_likely = jax.device_get(self._score(self._pretrained.params, batch, at))
    for i, places in enumerate(rows_at):
      used = slice(len(places))
      yield float(found[i, used].sum(dtype=np.float64)), bool(most_likely[i, used].all())


def _decoded(picture: Path | bytes | Image.Image) -> Image.Image:
  if isinstance(picture, Image.Image):
    return picture
  return image.read(io.BytesIO(picture), "in the data") if isinstance(picture, bytes) else (
    image.read(Path(picture)))  # fmt: skip


def _padded(array: np.ndarray, size: int, fill: int) -> np.ndarray:
  widths = [(0, size - len(array))] + [(0, 0)] * (array.ndim - 1)
  return np.pad(array, widths, constant_values=fill)


def _up(count: int, step: int) -> int:
  return -(-max(count, 1) // step) * step
