"""The engine: questions about images in, answers out, in batches of few static shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from llava_sp_jax.data import conversation, example, image
from llava_sp_jax.infer.generate import generate
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.models import build

BUCKET = 32  # prompt lengths are rounded up to a multiple of this


@dataclasses.dataclass(frozen=True)
class Request:
  """One question; `image` is a file, a decoded picture, or None for a question about text."""

  question: str
  image: str | Path | Image.Image | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
  text: str
  ids: tuple[int, ...]


class Engine:
  """Holds a model ready for questions. Each (bucket, batch size) is compiled once."""

  def __init__(
    self, pretrained: Pretrained, batch_size: int = 64, max_new_tokens: int = 32,
    temperature: float = 0.0, seed: int = 0,
  ):  # fmt: skip
    self._pretrained, self._batch_size = pretrained, batch_size
    config = pretrained.config
    self._template = conversation.TEMPLATES[config.data.template]
    self._image_tokens = build.image_token_count(config.model)
    self._preprocess = image.Preprocess(
      config.model.tower.image_size, config.data.image_mean, config.data.image_std
    )
    self._read = functools.lru_cache(maxsize=2048)(self._pixels_of_file)
    self._rng = jax.random.key(seed)
    stop = pretrained.tokenizer.encode(self._template.end)[:1]
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

  def _pixels_of_file(self, path: str) -> np.ndarray:
    return self._preprocess(image.read(Path(path)))

  def _row(self, request: Request) -> dict[str, np.ndarray]:
    side = self._preprocess.size
    pixels = np.zeros((side, side, 3), np.float32)
    if isinstance(request.image, Image.Image):
      pixels = self._preprocess(request.image)
    elif request.image is not None:
      pixels = self._read(str(request.image))
    asked = request.question
    if request.image is not None and conversation.IMAGE not in asked:
      asked = f"{conversation.IMAGE}\n{asked}"
    pieces = conversation.prompt(asked, self._template)
    runs = example.tokenize(pieces, self._pretrained.tokenizer)
    images = int(request.image is not None)
    length = sum(len(run.ids) for run in runs) + images * (self._image_tokens - 1)
    row = example.layout(runs, self._image_tokens, -(-length // BUCKET) * BUCKET, images).arrays()
    return {**row, "images": pixels[None]}

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
