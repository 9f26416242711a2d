"""Makes a checkpoint into what the server needs: an engine with room for any request, and facts."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from llava_sp_jax.config import Config, ConfigError
from llava_sp_jax.infer.caches import PictureCache
from llava_sp_jax.infer.engine import Engine
from llava_sp_jax.infer.generation import MOST_LOG_PROBABILITIES, Generation
from llava_sp_jax.infer.layout import ROUNDED, EngineLayout
from llava_sp_jax.infer.prompts import Prompts
from llava_sp_jax.infer.requests import Request
from llava_sp_jax.models import build
from llava_sp_jax.plan import traffic
from llava_sp_jax.serve.limits import Limits
from llava_sp_jax.serve.served import Served, Service

IMAGE_TOKEN = -1  # in place of the id that an image token does not have
# Words of the questions that the engine is warmed up with: each length is a program of its own.
WORDS = (4, 20, 36)
# Lengths are not known before they are asked, and few pictures are asked about again.
SIZES = dataclasses.replace(ROUNDED, growing=True, pictures=4096)
ROW_SHARE = 0.5  # of free memory, for rows: wider ones are made beside those that they replace
CACHE_SHARE = 0.125  # of free memory, for features of pictures, and for prefixes


def layout(config: Config, limits: Limits, base: EngineLayout = SIZES) -> EngineLayout:
  """Returns the layout of an engine for requests with any settings.

  Args:
    config: of the model, whose length bounds an answer.
    limits: `new_tokens` bounds it as well.
    base: what sizes are rounded up to, and the most positions of prompt and answer together.
  """
  longest = config.model.language_model.max_positions
  positions = min(base.positions or longest, longest)
  return dataclasses.replace(
    base,
    positions=positions,
    new_tokens=min(limits.new_tokens, positions - 1),  # at least one token is read
    log_probabilities=MOST_LOG_PROBABILITIES,
  )


def sizes(
  config: Config, limits: Limits, rows: int, positions: int, free: int | None
) -> EngineLayout:
  """Returns sizes that fit into memory.

  Args:
    config: of the model.
    limits: bound the bytes of the caches as well.
    rows: answers that are decoded together.
    positions: the most of prompt and answer together; 0: the model's, or as many as memory holds.
    free: bytes that are free beside the parameters; None if unknown.

  Raises: ConfigError when memory holds too few positions to answer with.
  """
  found = dataclasses.replace(
    SIZES,
    positions=positions,
    feature_bytes=int(limits.feature_bytes),
    prefix_bytes=int(limits.prefix_bytes),
  )
  if free is None:
    return found
  each = traffic.of(config.model).position * rows
  most = int(free * ROW_SHARE) // each // SIZES.capacity * SIZES.capacity
  least = build.image_token_count(config.model) + SIZES.capacity
  if (positions or most) > most or most < least:
    raise ConfigError(
      f"{free / 1e9:.2f} GB are free, which hold keys and values of {most:,} positions for {rows} "
      f"answers at a time; {max(positions, least):,} are needed: use a smaller --batch-size, "
      "--max-positions, --cache int8 or --weights int8"
    )
  return dataclasses.replace(
    found,
    positions=positions or most,
    feature_bytes=min(found.feature_bytes, int(free * CACHE_SHARE)),
    prefix_bytes=min(found.prefix_bytes, int(free * CACHE_SHARE)),
  )


def shortened(generation: Generation, layout: EngineLayout) -> Generation:
  """Returns settings for requests that say none, with answers that have room in `layout`."""
  most = min(generation.max_new_tokens, layout.new_tokens)
  return dataclasses.replace(generation, max_new_tokens=most)


def served(engine: Engine, service: Service, names: Sequence[str], rows: int) -> Served:
  """Returns what the server needs of an engine.

  Args:
    engine: the engine.
    service: answers by this engine.
    names: those by which clients may ask for the model.
    rows: how many answers the engine decodes together.
  """
  pretrained = engine.pretrained
  text = pretrained.config.model.language_model

  def tokens(request: Request) -> list[int]:
    pictures = PictureCache.of(pretrained.config)  # a new one, because nobody takes its pixels
    prompt = Prompts(pretrained.config, pretrained.tokenizer, pictures, share=False)(request)
    found = [np.where(piece.slots < 0, piece.tokens, IMAGE_TOKEN) for piece in prompt.pieces]
    return [int(token) for token in np.concatenate(found)]

  return Served(
    names=names,
    service=service,
    counts=engine.counts,
    tokens=tokens,
    generation=engine.generation,
    vocabulary=text.vocab_size,
    longest=engine.positions,
    rows=rows,
  )


def examples(config: Config) -> list[Request]:
  """Returns requests to warm up with: questions of several lengths, with a picture and without."""
  side = config.model.tower.image_size
  file = io.BytesIO()
  Image.new("RGB", (side, side), (128, 128, 128)).save(file, "PNG")
  pictures = ((file.getvalue(),), ())
  return [Request(" ".join(["what"] * count), each) for each in pictures for count in WORDS]


def described(engine: Engine) -> str:
  """Returns a line about a model: its variant, its size, and its tokens."""
  model = engine.pretrained.config.model
  count = sum(build.parameter_counts(model).values())
  return (
    f"variant {model.projector.variant}, {count / 1e6:,.1f} M parameters in {model.dtype}, "
    f"{build.image_token_count(model)} tokens for a tile of a picture, at most "
    f"{engine.positions:,} tokens of prompt and answer"
  )
