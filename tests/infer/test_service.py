"""Requests that arrive, stream, are cancelled and fail at any time."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Iterator

import pytest

from llava_sp_jax.infer.arrivals import ClosedError, QueueFullError
from llava_sp_jax.infer.engine import Engine, EngineLayout, Generation, Request
from llava_sp_jax.infer.pretrained import Pretrained
from llava_sp_jax.infer.service import Service, Update

ROOM = 400
PATIENCE = 60.0


@pytest.fixture(scope="module")
def engine(model: Pretrained) -> Engine:
  layout = EngineLayout(suffix=64, capacity=512, new_tokens=ROOM, log_probabilities=2)
  return Engine(model, 4, Generation(max_new_tokens=8), layout=layout)


@pytest.fixture
def service(engine: Engine) -> Iterator[Service]:
  service = Service(engine, waiting=24)
  service.start()
  yield service
  service.close()


class Client:
  """Submits a request and keeps its updates."""

  def __init__(self, service: Service, request: Request):
    self.updates: list[Update] = []
    self._new: queue.Queue[Update] = queue.Queue()
    self.ticket = service.submit(request, self._take)

  def _take(self, update: Update) -> None:
    self.updates.append(update)
    self._new.put(update)

  def next(self) -> Update:
    return self._new.get(timeout=PATIENCE)

  def last(self) -> Update:
    while (update := self.next()).answer is None:
      pass
    return update


def endless(request: Request, tokens: int = ROOM) -> Request:
  return dataclasses.replace(request, generation=Generation(max_new_tokens=tokens, ignore_eos=True))


def test_sixteen_clients_get_what_the_engine_answers(engine: Engine, asked: list[Request]) -> None:
  """At random times, from threads of their own; streamed texts are beginnings of the whole."""
  wanted = list(engine.answer(asked[:16]))
  service = Service(engine)
  service.start()
  found: dict[int, Client] = {}

  def ask(i: int) -> None:
    time.sleep(0.01 * (i * 7 % 5))
    found[i] = Client(service, asked[i])
    found[i].last()

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert service.drain(PATIENCE)
  service.close()
  for i, client in found.items():
    last = client.updates[-1]
    assert last.answer is not None
    assert (last.answer.ids, last.text) == (wanted[i].ids, wanted[i].text)
    assert all(last.text.startswith(update.text) for update in client.updates)
    assert last.begun is not None
    assert client.ticket.prompt_tokens == last.answer.prompt_tokens
  assert max(len(client.updates) for client in found.values()) > 4


def test_a_cancelled_row_is_free_at_the_next_step(service: Service, asked: list[Request]) -> None:
  long = [Client(service, endless(asked[i])) for i in range(4)]
  for client in long:
    client.next()
  assert service.running == 4
  waiting = Client(service, endless(asked[4], 2))
  steps = service.engine.counts.decode_steps
  long[2].ticket.cancel()
  assert waiting.last().answer is not None
  # The step that ran, the one that answers, and no wait for the end of another answer.
  assert service.engine.counts.decode_steps - steps < ROOM / 2
  assert all(client.updates[-1].answer is None for client in long)
  for client in long:
    client.ticket.cancel()
  deadline = time.monotonic() + PATIENCE
  while service.running and time.monotonic() < deadline:
    time.sleep(0.01)
  assert (service.running, service.waiting) == (0, 0)


def test_requests_that_wait_can_be_cancelled(service: Service, asked: list[Request]) -> None:
  running = [Client(service, endless(asked[0])) for _ in range(4)]
  for client in running:
    client.next()
  waiting = [Client(service, asked[i]) for i in range(6)]
  for client in waiting[:5]:
    client.ticket.cancel()
  for client in running:
    client.ticket.cancel()
  assert waiting[5].last().answer is not None
  assert [client.updates for client in waiting[:5]] == [[]] * 5


def test_a_full_queue_and_a_closed_service_refuse(engine: Engine, asked: list[Request]) -> None:
  service = Service(engine, waiting=2)
  service.start()
  running = [Client(service, endless(asked[0])) for _ in range(2)]
  for client in running:
    client.next()
  running += [Client(service, endless(asked[0])) for _ in range(2)]
  for client in running[2:]:
    client.next()
  waiting = [Client(service, asked[0]) for _ in range(2)]
  with pytest.raises(QueueFullError, match="2 requests wait; at most 2 may"):
    Client(service, asked[0])
  assert not service.drain(0.05)
  with pytest.raises(ClosedError):
    Client(service, asked[0])
  for client in running[:2]:
    client.ticket.cancel()
  assert all(client.last().answer for client in waiting)
  service.close()
  lost = running[3].updates[-1]
  assert lost.failed
  assert lost.answer is not None
  assert "has ended" in lost.answer.error


def test_tokens_that_wait_are_bounded(engine: Engine, asked: list[Request]) -> None:
  length = engine.prompt(asked[0]).length
  service = Service(engine, waiting_tokens=2 * length)  # its engine never starts
  for _ in range(2):
    Client(service, asked[0])
  deadline = time.monotonic() + PATIENCE
  while not all(a.prompt.done() for a in service._arrivals._waiting.values()):
    assert time.monotonic() < deadline
    time.sleep(0.01)
  with pytest.raises(QueueFullError, match=f"requests of {2 * length} tokens wait"):
    Client(service, asked[0])
  service.close()


def test_bad_requests_get_errors_and_others_answers(service: Service, asked: list[Request]) -> None:
  bad = Client(service, Request("what?", (b"nothing",)))
  long = Client(service, endless(asked[0], ROOM + 1))
  good = Client(service, asked[0])
  assert good.last().answer
  for client, message in ((bad, "cannot be decoded"), (long, "max_new_tokens: 401; at most 400")):
    update = client.last()
    assert client.updates == [update]
    assert update.answer is not None
    assert message in update.answer.error
    assert not update.failed


def test_an_error_of_the_engine_fails_its_requests_alone(
  service: Service,
  asked: list[Request],
  monkeypatch: pytest.MonkeyPatch,
  capfd: pytest.CaptureFixture[str],
) -> None:
  """In a step, all that are being answered; in the admission of a request, that request."""
  engine = service.engine
  decode, admit = engine._rows.decode, engine._rows.admit

  def broken(*_: object) -> None:
    monkeypatch.undo()
    raise RuntimeError("out of memory")

  running = Client(service, endless(asked[0]))
  running.next()
  monkeypatch.setattr(engine._rows, "admit", broken)
  refused = Client(service, asked[1]).last()
  assert refused.failed
  assert refused.answer is not None
  assert refused.answer.error == "the engine failed: RuntimeError"
  before = len(running.updates)
  running.next()
  assert running.updates[-1].answer is None
  assert len(running.updates) >= before
  monkeypatch.setattr(engine._rows, "decode", broken)
  assert running.last().failed
  assert Client(service, asked[2]).last().answer
  assert (engine._rows.decode, engine._rows.admit) == (decode, admit)
  assert "out of memory" in capfd.readouterr().err


def test_long_prompts_do_not_starve_a_short_one(service: Service, asked: list[Request]) -> None:
  """It waits for those that came before it, however many come after."""
  long = Request("word " * 60, asked[0].images, generation=Generation(max_new_tokens=3))
  stop = threading.Event()
  clients: list[Client] = []

  def flood() -> None:
    while not stop.is_set():
      try:
        clients.append(Client(service, long))
      except QueueFullError:
        time.sleep(0.002)

  thread = threading.Thread(target=flood)
  thread.start()
  while len(clients) < 20:
    time.sleep(0.002)
  while True:
    try:
      short = Client(service, asked[1])
      break
    except QueueFullError:
      time.sleep(0.001)
  ahead = len(clients)
  update = short.last()
  done = sum(client.updates[-1].answer is not None for client in clients if client.updates)
  stop.set()
  thread.join()
  assert update.answer is not None
  assert done <= 2 * ahead
  for client in clients:
    client.ticket.cancel()


def test_a_second_run_waits_for_no_one(service: Service, asked: list[Request]) -> None:
  Client(service, asked[0]).last()
  with pytest.raises(RuntimeError, match="is answering already"):
    next(service.engine.answer(asked[:1]))
