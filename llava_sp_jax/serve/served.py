"""Says what the server needs of a model: a service that answers requests, and facts about it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from llava_sp_jax.infer.counts import Counts
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.requests import Answer, Request, TokenLogProbability


class Update(Protocol):
  """Is what the service says about a request, in a thread of its own; the last one has the answer.

  `text` and `log_probabilities` are all so far. `failed` tells a fault of the engine from one of
  the request. `begun` is the time (`time.monotonic`) at which the request got a row.
  """

  @property
  def text(self) -> str: ...
  @property
  def answer(self) -> Answer | None: ...
  @property
  def failed(self) -> bool: ...
  @property
  def begun(self) -> float | None: ...
  @property
  def log_probabilities(self) -> tuple[TokenLogProbability, ...]: ...


class Ticket(Protocol):
  """Stands for a request that was submitted; `prompt_tokens` is known once its prompt is made."""

  @property
  def prompt_tokens(self) -> int | None: ...

  def cancel(self) -> None: ...


class Service(Protocol):
  """Answers requests that arrive at any time."""

  @property
  def running(self) -> int: ...
  @property
  def waiting(self) -> int: ...
  def submit(self, request: Request, listener: Callable[[Update], None]) -> Ticket: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
  """Holds a model that is served.

  `names` are those by which clients may ask for it, the first one is written into answers.
  """

  names: Sequence[str]
  service: Service
  counts: Counts  # of the engine
  tokens: Callable[[Request], Sequence[int]]  # of a prompt, -1 for an image token; SampleError
  generation: Generation  # what a request does not say
  vocabulary: int  # token ids
  longest: int  # tokens of prompt and answer together
  rows: int  # answers that are decoded at the same time
  created: int = dataclasses.field(default_factory=lambda: int(time.time()))
