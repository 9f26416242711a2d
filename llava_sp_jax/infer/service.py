"""Answers requests that arrive at any time, by one engine in a thread of its own."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable

from llava_sp_jax.infer.arrivals import Arrivals
from llava_sp_jax.infer.detokenizer import Detokenizer
from llava_sp_jax.infer.engine import Engine
from llava_sp_jax.infer.requests import Answer, Request, TokenLogProbability
from llava_sp_jax.infer.schedule import Ready

WAITING, WAITING_TOKENS = 256, 1 << 20


@dataclasses.dataclass(frozen=True)
class Update:
  """Holds an answer so far.

  `text` is what no later token can change, from the beginning. The last update has an `answer`;
  its `error` says why there is none. `failed` says that the engine failed, not the request. `begun`
  is when decoding began, on the clock of `time.monotonic`. `log_probabilities` are those of the
  tokens so far, if the settings ask for them.
  """

  text: str = ""
  answer: Answer | None = None
  failed: bool = False
  begun: float | None = None
  log_probabilities: tuple[TokenLogProbability, ...] = ()


Listener = Callable[[Update], None]


class Ticket:
  """Stands for one request of a service.

  `prompt_tokens` counts its text and image tokens, once its prompt is made.
  """

  def __init__(self, number: int, listener: Listener, cancel: Callable[[Ticket], None]):
    self.number, self.listener, self._cancel = number, listener, cancel
    self.prompt_tokens: int | None = None
    self.begun: float | None = None

  def cancel(self) -> None:
    """Gives up the answer; its row is free at the next step. No update follows."""
    self._cancel(self)


class Service:
  """Answers requests that arrive at any time, by one engine in a thread of its own.

  An error of the engine fails the requests that are being answered; others go on. An engine whose
  mesh spans several processes cannot serve.
  """

  def __init__(
    self, engine: Engine, *, waiting: int = WAITING, waiting_tokens: int = WAITING_TOKENS
  ):
    """Prepares a service; `start` begins it.

    Args:
      engine: answers nothing else meanwhile.
      waiting: the most requests that wait.
      waiting_tokens: the most positions of their prompts; more are not taken above it.

    Raises: ValueError for an engine that spans several processes.
    """
    if engine.programs.several:
      raise ValueError("a service needs an engine on the devices of one process")
    self.engine = engine
    threads = engine.threads
    self._arrivals = Arrivals(engine.prompt, threads, waiting, waiting_tokens)
    self._tickets: dict[int, Ticket] = {}
    self._lock = threading.Lock()
    self._idle = threading.Condition(self._lock)
    self._thread = threading.Thread(target=self._work, name="llava-sp-engine", daemon=True)

  @property
  def running(self) -> int:
    """Returns the number of requests that are being answered."""
    with self._lock:
      return sum(ticket.begun is not None for ticket in self._tickets.values())

  @property
  def waiting(self) -> int:
    """Returns the number of requests that wait."""
    return len(self._arrivals)

  def warm_up(self, requests: Iterable[Request]) -> None:
    """Compiles the programs for requests as long as these; before `start`."""
    self.engine.warm_up(requests)

  def start(self) -> None:
    """Starts the thread of the engine."""
    self._thread.start()

  def submit(self, request: Request, listener: Listener) -> Ticket:
    """Queues a request.

    Args:
      request: one without a number has number 0, so that its samples depend on its seed alone.
      listener: is called with each update, in the engine's thread; it must not wait.

    Raises: QueueFullError, ClosedError.
    """
    if request.number is None:
      request = dataclasses.replace(request, number=0)
    with self._lock:  # the engine may be faster than this method
      ticket = Ticket(self._arrivals.add(request), listener, self._cancel)
      self._tickets[ticket.number] = ticket
    return ticket

  def drain(self, seconds: float) -> bool:
    """Takes no more requests, and waits until all are answered; returns whether they are."""
    self._arrivals.close()
    with self._idle:
      return self._idle.wait_for(lambda: not self._tickets, timeout=seconds)

  def close(self) -> None:
    """Ends the thread of the engine. Requests that are not answered get an update with an error."""
    dropped = self._arrivals.stop()
    with self._lock:
      left = list(self._tickets.values())
    for ticket in left:
      if ticket.number not in dropped:
        self._arrivals.cancel(ticket.number)
    self._fail(left, "the service has ended", failed=True)
    if self._thread.is_alive():
      self._thread.join()

  # ---- the thread of the engine ----

  def _work(self) -> None:
    while True:
      try:
        for number, text in self.engine.serve(_Taking(self._arrivals, self._begin)):
          self._tell(number, text)
        return
      except Exception as error:
        traceback.print_exc(file=sys.stderr)
        with self._lock:
          lost = [ticket for ticket in self._tickets.values() if ticket.begun is not None]
        self._fail(lost, f"the engine failed: {type(error).__name__}", failed=True)

  def _begin(self, ready: Ready) -> None:
    with self._lock:
      ticket = self._tickets.get(ready.number)
    if ticket is not None:
      ticket.begun = time.monotonic()
      ticket.prompt_tokens = ready.prompt.length if ready.prompt else None

  def _tell(self, number: int, text: Detokenizer) -> None:
    with self._lock:
      ticket = self._tickets.get(number)
    if ticket is None:  # cancelled during the step
      return
    answer = text.answer() if text.finished else None
    update = Update(text.settled(), answer, text.failed, ticket.begun, text.log_probabilities)
    if text.finished:
      self._drop(ticket)
    ticket.listener(update)

  def _fail(self, tickets: Iterable[Ticket], error: str, *, failed: bool) -> None:
    for ticket in tickets:
      if self._drop(ticket):
        ticket.listener(Update(answer=Answer("", (), error), failed=failed, begun=ticket.begun))

  def _cancel(self, ticket: Ticket) -> None:
    if self._drop(ticket):
      self._arrivals.cancel(ticket.number)

  def _drop(self, ticket: Ticket) -> bool:
    """Forgets a ticket, and returns whether it was known."""
    with self._idle:
      known = self._tickets.pop(ticket.number, None) is not None
      self._idle.notify_all()
    return known


class _Taking:
  """Passes the requests of a queue on, and tells which are taken."""

  def __init__(self, arrivals: Arrivals, taken: Callable[[Ready], None]):
    self._arrivals, self._taken = arrivals, taken
    self.peek, self.wait, self.cancelled = arrivals.peek, arrivals.wait, arrivals.cancelled

  @property
  def more(self) -> bool:
    return self._arrivals.more

  def take(self) -> Ready | None:
    ready = self._arrivals.take()
    if ready is not None:
      self._taken(ready)
    return ready
