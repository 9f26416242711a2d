"""Defines the model that `llava_sp_jax.load` returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from llava_sp_jax.config import Config
from llava_sp_jax.convert.formats import Options
from llava_sp_jax.data import anyres
from llava_sp_jax.data.example import NEWLINE
from llava_sp_jax.infer import pretrained
from llava_sp_jax.infer.engine import Engine
from llava_sp_jax.infer.generation import DEFAULT, Generation
from llava_sp_jax.infer.likelihood import Likelihood
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.infer.requests import Answer, ImageFile, Request, tiles_of
from llava_sp_jax.models import build

Images = Sequence[ImageFile]


class VisionLanguageModel:
  """Answers questions about images, scores given answers, and encodes images.

  An image is a path, the bytes of a file, or a PIL image. Each `<image>` in a question stands for
  one of its images; without any, the images come before the question. All methods share one engine.
  The first call of each kind compiles its programs. Settings of generation are values of a request;
  only more room for an answer, more log-probabilities, or another number of beams make a new engine.
  """

  def __init__(self, pretrained: Pretrained, batch_size: int = 16, mesh: Mesh | None = None):
    """Wraps a loaded model.

    Args:
      pretrained: config, parameters and tokenizer.
      batch_size: how many answers are decoded at the same time; more requests wait their turn.
      mesh: devices with the axes data, fsdp, tensor; None is the first device of this process.
    """
    self._pretrained, self._batch_size, self._mesh = pretrained, batch_size, mesh
    self._reader = anyres.Reader(
      self.config.data, anyres.Tile(*build.tile_shape(self.config.model))
    )
    self._engine: Engine | None = None
    self._likelihood: Likelihood | None = None

  @property
  def config(self) -> Config:
    """The config of the checkpoint."""
    return self._pretrained.config

  def answer(
    self,
    question: str,
    images: Images = (),
    *,
    system: str | None = None,
    history: Sequence[tuple[str, str]] = (),
    generation: Generation = DEFAULT,
  ) -> str:
    """Answers one question. `system` replaces the system text of the conversation template.

    `history` are the earlier turns of a conversation, (question, answer); `images` are those of all
    turns.

    Raises: ValueError when there is no answer: an image that cannot be read, a prompt too long.
    """
    (answer,) = self.answers(
      [Request(question, tuple(images), system, history=tuple(history))], generation
    )
    if answer.error:
      raise ValueError(answer.error)
    return answer.text

  def answers(
    self, requests: Iterable[Request], generation: Generation = DEFAULT
  ) -> Iterator[Answer]:
    """Answers many questions in batches; yields answers in the order of the requests.

    If a request has no answer, `Answer.error` says why.
    """
    asked = (dataclasses.replace(r, generation=r.generation or generation) for r in requests)
    return self._answering(generation).answer(asked)

  def stream(
    self,
    question: str,
    images: Images = (),
    *,
    system: str | None = None,
    history: Sequence[tuple[str, str]] = (),
    generation: Generation = DEFAULT,
  ) -> Iterator[str]:
    """Yields parts of one answer while it is decoded.

    `system` replaces the system text of the conversation template. `history` are the earlier turns
    of a conversation, (question, answer); `images` are those of all turns.

    Raises: ValueError if there is no answer.
    """
    asked = Request(question, tuple(images), system, None, tuple(history), generation)
    return self._answering(generation).stream(asked)

  def loglikelihood(
    self, question: str, continuation: str, images: Images = (), *, system: str | None = None
  ) -> tuple[float, bool]:
    """Computes the log-probability of a given answer, `continuation`.

    `system` replaces the system text of the conversation template.

    Returns: the sum of the log-probabilities (natural logarithm) of the continuation's tokens, and
      whether greedy decoding chooses each of them.
    Raises: ValueError for an image that cannot be read.
    """
    engine = self._any_engine()
    if self._likelihood is None:
      self._likelihood = Likelihood(self._pretrained, 1, engine.programs)
    asked = Request(question, tuple(images), system)
    return next(self._likelihood([(asked, continuation)]))

  def encode_image(self, image: ImageFile) -> Float32[np.ndarray, "N D"]:
    """Encodes an image into the tokens that the decoder reads, in their order.

    Spatial tokens come first: S of the variant for each tile, then the patch tokens. Raises:
    ValueError for an image that cannot be read.
    """
    picture = tiles_of(image, self._reader)
    found = self._any_engine().programs.encode_image(picture.tiles)
    tokens, slots = np.asarray(found, np.float32), picture.plan.slots
    return tokens[np.where(slots == NEWLINE, len(tokens) - 1, slots)]

  def engine(self, generation: Generation = DEFAULT) -> Engine:
    """Returns an engine with these settings of generation; makes one if the last one had others."""
    if self._engine is None or self._engine.generation != generation:
      self._engine = self._likelihood = None  # their arrays are freed before others are made
      self._engine = Engine(self._pretrained, self._batch_size, generation, self._mesh)
    return self._engine

  def _answering(self, generation: Generation) -> Engine:
    """Returns the engine that was kept if it can answer with these settings, or else a new one."""
    engine = self._engine
    return engine if engine is not None and engine.fits(generation) else self.engine(generation)

  def _any_engine(self) -> Engine:
    """Returns the engine that was kept, whatever its settings."""
    return self._engine or self.engine()


def load(
  path: str | Path,
  *,
  options: Options | None = None,
  dtype: str = "",
  weights: str = "",
  cache: str = "",
  batch_size: int = 16,
  mesh: Mesh | None = None,
) -> VisionLanguageModel:
  """Loads a model for inference.

  Args:
    path: a run of `train`, a folder of any format that `llava-sp convert` reads, or a repository on
      the Hugging Face hub (organization/name, with hf: before it where a folder has the same name).
    options: what a foreign folder does not say: base model, tower, variant, template.
    dtype: float32 or bfloat16, of parameters and activations ("": the checkpoint's).
    weights: format of the decoder's weight matrices, such as int8 or int4, a row of
      `models.quantize.FORMATS` ("": the checkpoint's).
    cache: format of the keys and values of earlier positions: float or int8 ("": the checkpoint's).
    batch_size: how many answers are decoded at the same time.
    mesh: devices with the axes data, fsdp, tensor (default: the first device).

  Raises: CheckpointError, FormatError: for a path that is no such folder, or not a whole model;
    ConfigError: for an unknown format, or one that does not fit the model.
  """
  loaded = pretrained.from_any(path, options, dtype=dtype, weights=weights, cache=cache)
  return VisionLanguageModel(loaded, batch_size, mesh)
