"""What the engine behind a server answers without the server."""

from __future__ import annotations

import threading

from llava_sp_jax.infer.requests import Answer, Request
from llava_sp_jax.serve.served import Update
from tests.serve.conftest import Real


def again(real: Real, request: Request) -> Answer:
  """The engine's answer to a request."""
  answers: list[Answer] = []
  done = threading.Event()

  def hear(update: Update) -> None:
    if update.answer is not None:
      answers.append(update.answer)
      done.set()

  real.service.submit(request, hear)
  assert done.wait(60)
  return answers[0]
