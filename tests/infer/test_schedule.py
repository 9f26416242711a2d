"""The order of answering, reading ahead, and the stores that forget."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.infer.lru import Lru
from llava_sp_jax.infer.requests import Request
from llava_sp_jax.infer.schedule import Ready, Schedule


def drain(schedule: Schedule) -> list[Ready]:
  found = []
  while (ready := schedule.take()) is not None:
    found.append(ready)
  schedule.close()
  assert not schedule.more
  return found


def interleaved(count: int, images: int) -> list[Request]:
  return [Request(f"q{i}", (f"{i % images}.png",)) for i in range(count)]


def test_questions_about_an_image_stand_together_within_the_window() -> None:
  requests = interleaved(24, 4)
  ready = drain(Schedule(requests, lambda r: r, 2, window=24, ahead=4))  # type: ignore[arg-type]
  assert [r.request.images[0] for r in ready] == [f"{i}.png" for i in range(4) for _ in range(6)]
  assert sorted(r.number for r in ready) == list(range(24))
  assert all(r.request == requests[r.number] for r in ready)
  alone = drain(Schedule(requests, lambda r: r, 2, window=1, ahead=4))  # type: ignore[arg-type]
  assert [r.number for r in alone] == list(range(24))


def test_requests_are_taken_and_read_only_so_far_ahead() -> None:
  taken, read, lock = [], [], threading.Lock()

  def requests() -> Iterator[Request]:
    for i, request in enumerate(interleaved(50, 50)):
      taken.append(i)
      yield request

  def prompt(request: Request) -> Any:
    with lock:
      read.append(request)
    return request

  schedule = Schedule(requests(), prompt, 3, window=8, ahead=4)  # type: ignore[arg-type]
  for done in range(1, 20):
    assert schedule.take() is not None
    assert len(taken) <= done + 8 + 4
    assert len(read) <= done + 4
  assert len(drain(schedule)) == 31


def test_what_cannot_be_read_says_so_and_the_rest_goes_on() -> None:
  def prompt(request: Request) -> Any:
    if request.question == "q3":
      raise SampleError("no such thing")
    return request

  ready = drain(Schedule(interleaved(8, 8), prompt, 2, window=8, ahead=8))  # type: ignore[arg-type]
  assert [r.error for r in ready] == ["", "", "", "no such thing", "", "", "", ""]


def test_the_store_drops_what_was_not_used_for_longest() -> None:
  store = Lru(3 * 40)
  for i in range(3):
    store.put(i, (jnp.zeros(10),))
  assert store.get(0) is not None
  store.put(3, (jnp.zeros(10),))
  assert [i in store for i in range(4)] == [True, False, True, True]
  store.put(4, jnp.zeros(100))  # larger than the limit: kept alone
  assert len(store) == 1
  assert store.get(4).nbytes == 400
  assert store.get(0) is None
