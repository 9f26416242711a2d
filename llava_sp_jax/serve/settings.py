"""Turns the settings of a request into those of the engine."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable
from typing import Any

from llava_sp_jax.infer.generation import MOST, Generation
from llava_sp_jax.serve import protocol
from llava_sp_jax.serve.errors import ApiError

# What a request says -> (the field of Generation, how its value is written there).
FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
  "most_tokens": ("max_new_tokens", int),
  "min_tokens": ("min_new_tokens", int),
  "temperature": ("temperature", float),
  "top_p": ("top_p", float),
  "top_k": ("top_k", lambda count: min(max(count, 0), MOST)),  # -1 is 0: all tokens
  "min_p": ("min_p", float),
  "seed": ("seed", int),
  "stops": ("stop", tuple),
  "stop_token_ids": ("stop_ids", tuple),
  "ignore_eos": ("ignore_eos", bool),
  "presence_penalty": ("presence_penalty", float),
  "frequency_penalty": ("frequency_penalty", float),
  "repetition_penalty": ("repetition_penalty", float),
  "logit_bias": ("logit_bias", lambda biases: tuple(biases.items())),
  "log_probabilities": ("log_probabilities", int),
}
OF_TOKENS = ("stop_token_ids", "logit_bias")  # fields with ids of tokens


def generation(
  asked: protocol.Settings, default: Generation, vocabulary: int, longest: int
) -> Generation:
  """Returns the settings of a request; what it does not say is as in `default`.

  Args:
    asked: the request; without a seed, its samples get one that was not used before.
    default: the settings of the server.
    vocabulary: the number of token ids.
    longest: the most tokens of prompt and answer together.

  Raises: ApiError for a token id outside the vocabulary, an answer longer than the model can
    write, and settings that do not go together.
  """
  for name in OF_TOKENS:
    if wrong := [token for token in getattr(asked, name) or () if token >= vocabulary]:
      message = f"{name}: token id {wrong[0]}; the vocabulary has {vocabulary:,}"
      raise ApiError("invalid_value", message, name)
  given = {
    field: write(value)
    for name, (field, write) in FIELDS.items()
    if (value := getattr(asked, name)) is not None and value != ()
  }
  given.setdefault("seed", secrets.randbits(63))
  given.setdefault("max_new_tokens", max(default.max_new_tokens, given.get("min_new_tokens", 0)))
  if (most := given["max_new_tokens"]) >= longest:
    raise ApiError(
      "context_length_exceeded",
      f"{most:,} tokens of an answer do not fit behind a prompt: the model reads and writes "
      f"{longest:,} together; send a smaller max_tokens",
      "max_tokens",
    )
  try:
    return dataclasses.replace(default, **given)
  except ValueError as error:
    raise ApiError("invalid_value", str(error)) from None
