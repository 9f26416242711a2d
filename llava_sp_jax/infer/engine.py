"""The engine: questions about images in, answers out, in batches of few static shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from llava_sp_jax.data import anyres, conversation, example, image
from llava_sp_jax.infer.generate import generate
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.models import build

BUCKET = 32  # prompt lengths are rounded up to a multiple of this
PICTURES = 2048  # tiles of pictures that are kept, for the next question about them


@dataclasses.dataclass(frozen=True)
class Request:
  """One question; `image` is a file, a decoded picture, or None for a question about text."""

  question: str
  images: tuple[Path | bytes | Image.Image, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer:
  text: str
  ids: tuple[int, ...]
  error: str = ""


@dataclasses.dataclass
class Counts:
  requests: int = 0
  distinct_images: int = 0
  encoder_calls: int = 0


class Engine:
  """Holds a model ready for questions. Each (bucket, batch size) is compiled once."""

  def __init__(
    self, pretrained: Pretrained, batch_size: int = 64, generation: Generation = Generation(),
  ):  # fmt: skip
    self._pretrained, self._batch_size = pretrained, batch_size
    self.pretrained, self.generation, self.counts = pretrained, generation, Counts()
    max_new_tokens, temperature, seed = (
      generation.max_new_tokens, generation.temperature, generation.seed)
    config = pretrained.config
    self._template = conversation.TEMPLATES[config.data.template]
    self._reader = anyres.Reader(config.data, anyres.Tile(*build.tile_shape(config.model)))
    self._read = functools.lru_cache(PICTURES // self._reader.max_tiles)(self._picture_of_file)
    self._rng = jax.random.key(seed)
    stop = pretrained.tokenizer.stop_ids(self._template.end)
    module = build.model(config.model)
    self._generate = jax.jit(
      functools.partial(
        generate, module, stop_ids=stop, max_new_tokens=max_new_tokens, temperature=temperature
      )
    )

  def answer(self, requests: Iterable[Request]) -> Iterator[Answer]:
    """Answers in the order of the requests, computed `batch_size` at a time.

    Raises: SampleError for an image that cannot be read.
    """
    waiting: list[dict[str, np.ndarray]] = []
    for request in requests:
      waiting.append(self._row(request))
      if len(waiting) == self._batch_size:
        yield from self._run(waiting)
        waiting = []
    if waiting:
      yield from self._run(waiting)

  def as_ready(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
    waiting: list[tuple[int, dict[str, np.ndarray]]] = []

    def run() -> Iterator[tuple[int, Answer]]:
      for (index, _), answer in zip(waiting, list(self._run([row for _, row in waiting]))):
        yield index, answer
      waiting.clear()

    for index, request in enumerate(requests):
      self.counts.requests += 1
      try:
        waiting.append((index, self._row(request)))
      except conversation.SampleError as error:
        yield index, Answer("", (), str(error))
      if len(waiting) == self._batch_size:
        yield from run()
    if waiting:
      yield from run()

  def _picture_of_file(self, path: str) -> anyres.Picture:
    return self._reader(image.read(Path(path)))

  def _row(self, request: Request) -> dict[str, np.ndarray]:
    side, room = self._reader.tile.size, self._reader.max_tiles
    pictures = []
    for image_ in request.images:
      if isinstance(image_, Image.Image):
        pictures.append(self._reader(image_))
      elif isinstance(image_, bytes):
        import io
        pictures.append(self._reader(image.read(io.BytesIO(image_), "bytes")))
      else:
        pictures.append(self._read(str(image_)))
    pixels, plans = np.zeros((room, side, side, 3), np.float32), [p.plan for p in pictures]
    for picture in pictures:
      pixels[: picture.plan.tiles] = picture.tiles
    asked = request.question
    if request.images and conversation.IMAGE not in asked:
      asked = f"{conversation.IMAGE}\n" * len(request.images) + asked
    pieces = conversation.prompt(asked, self._template)
    runs = example.tokenize(pieces, self._pretrained.tokenizer)
    length = sum(len(run.ids) for run in runs) + sum(len(p.slots) - 1 for p in plans)
    row = example.layout(runs, plans, -(-length // BUCKET) * BUCKET, room).arrays()
    return {**row, "images": pixels}

  def _run(self, rows: list[dict[str, np.ndarray]]) -> Iterator[Answer]:
    length = max(len(row["tokens"]) for row in rows)
    names = ("tokens", "positions", "segments", "slots", "images")
    batch = {}
    for name in names:
      fill = -1 if name == "slots" else 0
      padded = [
        row[name] if name == "images"
        else np.pad(row[name], (0, length - len(row[name])), constant_values=fill)
        for row in rows
      ]  # fmt: skip
      padded += [padded[-1]] * (self._batch_size - len(rows))  # always the compiled size
      batch[name] = np.stack(padded)
    ids, counts = jax.device_get(self._generate(self._pretrained.params, batch, self._rng))
    for row_ids, count in list(zip(ids, counts, strict=True))[: len(rows)]:
      kept = tuple(int(i) for i in row_ids[:count])
      yield Answer(self._pretrained.tokenizer.decode(kept).strip(), kept)
