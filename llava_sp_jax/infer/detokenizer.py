"""Detokenizes an answer while it grows: finds stop strings and the text that is final."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from llava_sp_jax.data.tokenizer import Tokenizer
from llava_sp_jax.infer.requests import Answer

UNFINISHED = "\ufffd"  # the decoded text of an incomplete character


class Detokenizer:
  """Turns the tokens of one answer into text, and ends the answer at one of the `stop` strings.

  With an `error`, the answer has ended without text.
  """

  def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), error: str = ""):
    self._tokenizer, self._stop = tokenizer, stop
    self.error, self.finished = error, bool(error)
    self.ids: tuple[int, ...] = ()
    self._text, self._margin = "", float("inf")

  def extend(self, ids: Sequence[int] | Int[np.ndarray, " N"], done: bool, margin: float) -> None:
    """Takes the tokens of the answer, and looks for stop strings in its text.

    Args:
      ids: all tokens so far, with those of earlier calls.
      done: whether the device has ended the answer.
      margin: the smallest lead, in logits, of a chosen token over the next best one.
    """
    seen, self._margin, self.finished = len(self.ids), margin, done
    self.ids = tuple(int(i) for i in ids)
    if not self._stop and not done:
      return
    self._text = self._tokenizer.decode(self.ids)
    if self._cut() is None:
      return
    for count in range(seen + 1, len(self.ids) + 1):  # which token completes a stop string
      self._text = self._tokenizer.decode(self.ids[:count])
      if (cut := self._cut()) is not None:
        self.ids, self._text, self.finished = self.ids[:count], self._text[:cut], True
        return

  def _cut(self) -> int | None:
    places = [at for stop in self._stop if (at := self._text.find(stop)) >= 0]
    return min(places) if places else None

  def settled(self) -> str:
    """Returns the text that no later token can change.

    It excludes incomplete characters, the possible beginning of a stop string, and outer blanks.
    """
    if self.finished:
      return self._text.strip()
    text = self._tokenizer.decode(self.ids).rstrip(UNFINISHED)
    held = max((_overlap(text, stop) for stop in self._stop), default=0)
    return text[: len(text) - held].strip()

  def answer(self) -> Answer:
    """Returns the `Answer`, without outer blanks; one with `error` and no text if it failed."""
    if self.error:
      return Answer("", (), self.error)
    return Answer(self._text.strip(), self.ids, margin=self._margin)


def _overlap(text: str, stop: str) -> int:
  """Returns how many characters at the end of `text` may be the beginning of `stop`."""
  return next((n for n in range(min(len(stop), len(text)), 0, -1) if text.endswith(stop[:n])), 0)
