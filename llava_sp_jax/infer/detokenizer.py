"""Detokenizes an answer while it grows: finds stop strings and the text that is final."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.infer.generation import DEFAULT, Generation
from llava_sp_jax.infer.requests import Answer, TokenLogProbability

UNFINISHED = "\ufffd"  # the decoded text of an incomplete character


class Logged(NamedTuple):
  """Holds log-probabilities of the tokens of one answer (`sampling.LogProbabilities`)."""

  chosen: Float[np.ndarray, " N"]
  top_ids: Int[np.ndarray, "N n"]
  top: Float[np.ndarray, "N n"]


class Detokenizer:
  """Turns the tokens of one answer into text, and ends the answer at a stop string.

  With an `error`, the answer has ended without text; `failed` says that the engine is to blame.
  """

  def __init__(
    self,
    tokenizer: Tokenizer,
    generation: Generation = DEFAULT,
    error: str = "",
    prompt_tokens: int = 0,
    failed: bool = False,
  ):
    self._tokenizer, self.generation = tokenizer, generation
    self.error, self.finished = error, bool(error)
    self.prompt_tokens, self.failed = prompt_tokens, failed
    self.ids: tuple[int, ...] = ()
    self._text, self._margin, self._stopped = "", float("inf"), False
    self._log: list[TokenLogProbability] = []

  @property
  def logs(self) -> bool:
    """Returns whether log-probabilities are wanted."""
    return self.generation.log_probabilities is not None

  @property
  def log_probabilities(self) -> tuple[TokenLogProbability, ...]:
    """Returns those of the tokens so far; empty unless the settings ask for them."""
    return tuple(self._log[: len(self.ids)])

  def extend(
    self,
    ids: Sequence[int] | Int[np.ndarray, " N"],
    done: bool,
    margin: float,
    logged: Logged | None = None,
  ) -> None:
    """Takes the tokens of the answer, and looks for stop strings in its text.

    Args:
      ids: all tokens so far, with those of earlier calls.
      done: whether the device has ended the answer.
      margin: the smallest lead, in logits, of a chosen token over the next best one.
      logged: log-probabilities of all tokens so far, if they are wanted.
    """
    seen, self._margin, self.finished = len(self.ids), margin, done
    self.ids = tuple(int(i) for i in ids)
    self._stopped = done and len(self.ids) < self.generation.max_new_tokens
    if logged is not None:
      self._log += [self._of(logged, at) for at in range(len(self._log), len(self.ids))]
    if not self.generation.stop and not done:
      return
    self._text = self._tokenizer.decode(self.ids)
    if self._cut() is None:
      return
    for count in range(seen + 1, len(self.ids) + 1):  # which token completes a stop string
      self._text = self._tokenizer.decode(self.ids[:count])
      if (cut := self._cut()) is not None:
        self.ids, self._text, self.finished = self.ids[:count], self._text[:cut], True
        self._stopped = False
        return

  def _of(self, logged: Logged, at: int) -> TokenLogProbability:
    count = self.generation.log_probabilities or 0
    likeliest = zip(logged.top_ids[at, :count], logged.top[at, :count], strict=True)
    top = tuple((int(i), self._tokenizer.decode([int(i)]), float(value)) for i, value in likeliest)
    token = self.ids[at]
    return TokenLogProbability(
      token, self._tokenizer.decode([token]), float(logged.chosen[at]), top
    )

  def _cut(self) -> int | None:
    stops = self.generation.stop
    places = [at for stop in stops if (at := self._text.find(stop)) >= 0]
    return min(places) if places else None

  def settled(self) -> str:
    """Returns the text that no later token can change.

    It excludes incomplete characters, the possible beginning of a stop string, and outer blanks.
    """
    if self.finished:
      return self._text.strip()
    text = self._tokenizer.decode(self.ids).rstrip(UNFINISHED)
    held = max((_overlap(text, stop) for stop in self.generation.stop), default=0)
    return text[: len(text) - held].strip()

  def answer(self) -> Answer:
    """Returns the `Answer`, without outer blanks; one with `error` and no text if it failed."""
    if self.error:
      return Answer("", (), self.error)
    return Answer(
      self._text.strip(),
      self.ids,
      margin=self._margin,
      reason="length" if len(self.ids) >= self.generation.max_new_tokens else "stop",
      prompt_tokens=self.prompt_tokens,
      tokens=len(self.ids) + self._stopped,
      log_probabilities=self.log_probabilities if self.logs else None,
    )


def _overlap(text: str, stop: str) -> int:
  """Returns how many characters at the end of `text` may be the beginning of `stop`."""
  return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
