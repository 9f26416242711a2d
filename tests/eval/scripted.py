"""An engine that answers from a script, and what was answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llava_sp_jax.config import Config
from llava_sp_jax.infer import pretrained
from llava_sp_jax.infer.engine import Answer, Counts, Engine, Request
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.results import predictions


class Tokenizer:
  """One that nothing is read with."""

  def fingerprint(self) -> str:
    return "no tokenizer"


class Scripted(Engine):
  """Says `texts` in turn, whatever is asked; `fails` at images by name; may die on the way."""

  def __init__(
    self,
    dies_after: int = 0,
    tokens: int = 4,
    texts: Iterable[str] = ("yes",),
    fails: Mapping[str, str] | None = None,
  ):
    self._generation = Generation(max_new_tokens=tokens)
    tokenizer: Any = Tokenizer()
    self.pretrained = pretrained.Pretrained(Config(), {"w": np.ones(3, np.float32)}, tokenizer)
    self.counts = Counts()
    self.asked: list[str] = []
    self.numbers: list[int | None] = []
    self._dies_after, self._texts, self._fails = dies_after, list(texts), fails or {}

  def forget(self) -> None:
    self._fails = {}

  def as_ready(self, requests: Iterable[Request]) -> Iterator[tuple[int, Answer]]:
    for index, request in enumerate(requests):
      if self._dies_after and len(self.asked) == self._dies_after:
        1 / 0  # noqa: B018
      (image,) = request.images
      name = image.name if isinstance(image, Path) else "bytes"
      self.asked.append(name)
      self.numbers.append(request.number)
      self.counts = dataclasses.replace(self.counts, requests=self.counts.requests + 1)
      error = self._fails.get(name, "")
      text = "" if error else self._texts[len(self.asked) % len(self._texts)]
      yield index, Answer(text, (), error)


def by_id(folder: Path) -> dict[str, Any]:
  """All answers of a result folder."""
  records = predictions.read_file(folder / predictions.FILE)
  for record in records:
    del record["margin"]  # the last bits depend on the batch
  found = {record["id"]: record for record in records}
  assert len(found) == len(records), "an id is there twice"
  return found
