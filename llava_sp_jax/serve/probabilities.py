"""Writes the log probabilities of tokens as the protocol has them."""

from __future__ import annotations

from collections.abc import Sequence

from llava_sp_jax.infer.requests import TokenLogProbability
from llava_sp_jax.serve import protocol

LEAST = -9999.0  # stands for minus infinity, which JSON cannot say


def written(tokens: Sequence[TokenLogProbability]) -> protocol.LogProbabilities:
  """Returns the log probabilities of chosen tokens, each with the likeliest ones at its place."""
  return protocol.LogProbabilities([_chosen(token) for token in tokens])


def _chosen(token: TokenLogProbability) -> protocol.ChosenToken:
  top = [protocol.TopToken(text, max(value, LEAST), _bytes(text)) for _, text, value in token.top]
  return protocol.ChosenToken(token.text, max(token.value, LEAST), _bytes(token.text), top)


def _bytes(text: str) -> list[int]:
  return list(text.encode())
