"""A service without a model: it says words of its own, as the settings of a request want them.

For what a real engine does not do on demand: failing, being full, and taking its time.
"""

from __future__ import annotations

import dataclasses
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from llava_sp_jax.infer.arrivals import ClosedError, QueueFullError
from llava_sp_jax.infer.counts import Counts
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.requests import Answer, Request, TokenLogProbability
from llava_sp_jax.serve.served import Served, Update

WORDS = ("<end>", "a", "red", "square", "is", "on", "the", "left", "of", "two", "äö", "😀")
END = 0
LONGEST = 4096
PICTURE = 9  # tokens
DEFAULT = Generation(max_new_tokens=16)


@dataclasses.dataclass(frozen=True)
class Report:
  text: str = ""
  answer: Answer | None = None
  failed: bool = False
  begun: float | None = None
  log_probabilities: tuple[TokenLogProbability, ...] = ()


class Ticket:
  def __init__(self) -> None:
    self.cancelled = threading.Event()
    self.prompt_tokens: int | None = None

  def cancel(self) -> None:
    self.cancelled.set()


def prompt_tokens(request: Request) -> int:
  texts = [request.system or "", request.question, *(t for turn in request.history for t in turn)]
  return 1 + sum(len(text.split()) for text in texts) + PICTURE * len(request.images)


class FakeService:
  """Answers each request in a thread; what a question begins with changes how.

  `slow`: a token in 0.02 s; `fail`: the engine fails; `break`: it does so after a token; `refuse`:
  there is no answer; `crash`: an exception of `submit`; `silent`: no report until it is cancelled.
  """

  def __init__(self) -> None:
    self.counts = Counts()
    self.running = self.waiting = 0
    self.room = 1 << 20  # requests that are still taken
    self.shut = False
    self.asked: list[Request] = []
    self.tickets: list[Ticket] = []

  def submit(self, request: Request, listener: Callable[[Update], None]) -> Ticket:
    if not self.room:
      raise QueueFullError("1 request waits; ask again later")
    self.room -= 1
    if self.shut:
      raise ClosedError("the engine is closed")
    if request.question.startswith("crash"):
      raise ZeroDivisionError("a bug")
    ticket = Ticket()
    self.asked.append(request)
    self.tickets.append(ticket)
    self.counts.images_asked += len(request.images)
    arguments = (request, listener, ticket)
    threading.Thread(target=self._run, args=arguments, daemon=True).start()
    return ticket

  def _run(self, request: Request, listener: Callable[[Update], None], ticket: Ticket) -> None:
    self.running += 1
    try:
      self._answer(request, listener, ticket)
    finally:
      self.running -= 1

  def _answer(self, request: Request, listener: Callable[[Update], None], ticket: Ticket) -> None:
    settings = request.generation or DEFAULT
    count = ticket.prompt_tokens = prompt_tokens(request)
    begun = time.monotonic()
    kind = request.question.partition(" ")[0]
    if kind == "silent":
      ticket.cancelled.wait(60)
      return
    if kind == "fail":
      listener(Report("", Answer("", (), "out of memory at 0xdeadbeef"), failed=True))
      return
    if kind == "refuse":
      listener(Report("", Answer("", (), "the picture is unreadable")))
      return
    if count + settings.max_new_tokens > LONGEST:
      error = f"the prompt has {count} positions, which are too many"
      listener(Report("", Answer("", (), error)))
      return
    said = self._words(request, settings)
    logged = _logged(said, settings.log_probabilities)
    for length in range(1, len(said) + 1):
      if kind == "slow":
        time.sleep(0.02)
      if ticket.cancelled.is_set():
        return
      answer = _answered(said[:length], length == len(said), settings, count, logged)
      going = answer.error == "going"
      listener(
        Report(answer.text, None if going else answer, False, begun, answer.log_probabilities or ())
      )
      if not going:
        return
      if kind == "break":
        time.sleep(0.1)  # until the text was sent
        listener(Report("", Answer("", (), "out of memory at 0xdeadbeef"), failed=True))
        return

  def _words(self, request: Request, settings: Generation) -> list[int]:
    """All that would be said: from the seed and the number if it is drawn, else from the question."""
    seed: Any = request.question
    if settings.temperature:
      seed = f"{settings.seed} {request.number} {seed}"
    draw = random.Random(seed)
    bias = dict(settings.logit_bias)
    chosen: list[int] = []
    while len(chosen) < settings.max_new_tokens:
      weights = [max(1e-9, 1 + bias.get(token, 0)) for token in range(len(WORDS))]
      if settings.ignore_eos or len(chosen) < settings.min_new_tokens:
        weights[END] = 0
      token = max(range(len(WORDS)), key=lambda t: weights[t] * draw.random())
      chosen.append(token)
      if token == END or token in settings.stop_ids:
        break
    return chosen


def _answered(
  said: list[int],
  whole: bool,
  settings: Generation,
  count: int,
  logged: tuple[TokenLogProbability, ...],
) -> Answer:
  ends = said[-1] == END or said[-1] in settings.stop_ids
  ids = tuple(said[:-1] if ends else said)
  text = " ".join(WORDS[token] for token in ids)
  places = [at for stop in settings.stop if (at := text.find(stop)) >= 0]
  stopped = bool(places)
  if stopped:
    text = text[: min(places)].strip()
  elif not (whole or ends):  # what might begin a stop string is held back
    held = max((n for s in settings.stop for n in range(len(s)) if text.endswith(s[:n])), default=0)
    text = text[: len(text) - held].strip()
  done = whole or ends or stopped
  reason: Any = "stop" if ends or stopped else "length"
  return Answer(
    text,
    ids,
    "" if done else "going",
    reason=reason,
    prompt_tokens=count,
    tokens=len(said),
    log_probabilities=None if settings.log_probabilities is None else logged[: len(ids)],
  )


def _logged(said: list[int], top: int | None) -> tuple[TokenLogProbability, ...]:
  others = tuple((i, WORDS[i], float("-inf") if i else -0.5) for i in range(top or 0))
  return tuple(TokenLogProbability(token, WORDS[token], -0.25, others) for token in said)


def served(service: FakeService) -> Served:
  def tokens(request: Request) -> list[int]:
    return [*range(prompt_tokens(request) - PICTURE * len(request.images))] + [-1] * (
      PICTURE * len(request.images)
    )

  return Served(
    names=("tiny", "other"),
    service=service,
    counts=service.counts,
    tokens=tokens,
    generation=DEFAULT,
    vocabulary=len(WORDS),
    longest=LONGEST,
    rows=4,
  )
