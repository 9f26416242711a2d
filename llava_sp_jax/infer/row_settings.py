"""Holds the settings of requests as arrays, so that requests with any settings share a program.

Shape letters:  R rows . K places for stop ids . M places for biases . W bytes for the vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt

from llava_sp_jax.infer.generation import MOST_BIASES, MOST_STOP_IDS, Generation
from llava_sp_jax.infer.requests import Prompt

NOBODY = -1  # a place without a token
OWN_STOP_IDS = 32  # places for the ids that end a reply of the template


class RowSettings(NamedTuple):
  """Holds the settings of each row; values of a program, not constants of it."""

  key: UInt[Any, "R 2"]  # uint32, the seed
  number: Int[Any, " R"]  # int32, folded into the key; like the next ones
  limit: Int[Any, " R"]  # the most tokens
  least: Int[Any, " R"]  # tokens before which no stop id is chosen
  top_k: Int[Any, " R"]
  temperature: Float[Any, " R"]  # float32, like the next ones
  top_p: Float[Any, " R"]
  min_p: Float[Any, " R"]
  presence: Float[Any, " R"]
  frequency: Float[Any, " R"]
  repetition: Float[Any, " R"]
  stop_ids: Int[Any, "R K"]  # int32, NOBODY in free places
  biased: Int[Any, "R M"]  # int32, ids, NOBODY in free places
  bias: Float[Any, "R M"]  # float32
  prompt: UInt[Any, "R W"]  # uint8, a bit for each id that the prompt has; 0 unless it is needed
  logged: Bool[Any, " R"]  # whether log-probabilities are wanted


def bytes_of(vocabulary: int) -> int:
  """Returns W, the bytes of one bit for each id."""
  return -(-vocabulary // 8)


def empty(rows: int, vocabulary: int, limit: int) -> RowSettings:
  """Returns the settings of `rows` greedy rows of at most `limit` tokens that never stop."""

  def all_of(value: float, dtype: Any = np.float32) -> Any:
    return np.full(rows, value, dtype)

  return RowSettings(
    key=np.zeros((rows, 2), np.uint32),
    number=all_of(0, np.int32),
    limit=all_of(limit, np.int32),
    least=all_of(0, np.int32),
    top_k=all_of(0, np.int32),
    temperature=all_of(0),
    top_p=all_of(1),
    min_p=all_of(0),
    presence=all_of(0),
    frequency=all_of(0),
    repetition=all_of(1),
    stop_ids=np.full((rows, MOST_STOP_IDS + OWN_STOP_IDS), NOBODY, np.int32),
    biased=np.full((rows, MOST_BIASES), NOBODY, np.int32),
    bias=np.zeros((rows, MOST_BIASES), np.float32),
    prompt=np.zeros((rows, bytes_of(vocabulary)), np.uint8),
    logged=np.zeros(rows, bool),
  )


def of(
  generations: Sequence[Generation],
  numbers: Sequence[int],
  prompts: Sequence[Prompt | None],
  stop_ids: Sequence[int],
  vocabulary: int,
) -> RowSettings:
  """Returns the settings of requests, arrays on the host.

  Args:
    generations: the settings of each row.
    numbers: the number of each row's request, which seeds its samples together with the seed.
    prompts: the prompt of each row; None is one without text.
    stop_ids: those that end a reply of the template.
    vocabulary: V, the number of logits.
  """
  result = empty(len(generations), vocabulary, 0)
  for row, (one, number, prompt) in enumerate(zip(generations, numbers, prompts, strict=True)):
    result.key[row] = seed_of(one.seed)
    stops = [*(() if one.ignore_eos else stop_ids), *one.stop_ids]
    values = {
      "number": number, "limit": one.max_new_tokens, "least": one.min_new_tokens,
      "top_k": one.top_k, "temperature": one.temperature, "top_p": one.top_p, "min_p": one.min_p,
      "presence": one.presence_penalty, "frequency": one.frequency_penalty,
      "repetition": one.repetition_penalty, "logged": one.log_probabilities is not None,
    }  # fmt: skip
    for name, value in values.items():
      getattr(result, name)[row] = value
    result.stop_ids[row, : len(stops)] = stops
    for place, (token, bias) in enumerate(one.logit_bias):
      result.biased[row, place], result.bias[row, place] = token, bias
    if one.repetition_penalty != 1 and prompt is not None:
      present = np.zeros(8 * result.prompt.shape[1], bool)
      present[prompt.text_ids] = True
      result.prompt[row] = np.packbits(present)
  return result


def seed_of(seed: int) -> UInt[np.ndarray, " 2"]:
  """Returns the data of `jax.random.key(seed)`, [2] uint32, for a seed of 64 bits."""
  return np.asarray([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)
