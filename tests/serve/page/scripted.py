"""The page behind a server that answers by a script, in the protocol of the real one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from llava_sp_jax import config as config_lib
from llava_sp_jax.serve import answers, conversation, page, protocol, reading
from llava_sp_jax.serve.access import check_key
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.limits import DEFAULT

# The tokens of an answer, and what each leads by: (token, probability, next token, its probability).
TOKENS = (
  ("There", 0.9, "It", 0.05),
  (" is", 0.95, " are", 0.02),
  (" a", 0.8, " one", 0.1),
  (" teal", 0.4, " blue", 0.35),
  (" disk", 0.7, " circle", 0.2),
  (".", 0.99, "!", 0.004),
)
TEXT = "".join(token for token, *_ in TOKENS)
SMALLEST = "0.13"  # ln(0.4 / 0.35)
PROMPT = 600
GAP = 0.03  # seconds between tokens


def chosen(token: str, share: float, other: str, less: float) -> protocol.ChosenToken:
  top = [
    protocol.TopToken(text, math.log(value), list(text.encode()))
    for text, value in ((token, share), (other, less))
  ]
  return protocol.ChosenToken(token, math.log(share), list(token.encode()), top)


@dataclasses.dataclass
class Server:
  """What the page has asked, and how the server behaves."""

  url: str = ""
  key: str = ""
  cold: int = 0  # so many more times /health says 503
  asked: list[protocol.ChatRequest] = dataclasses.field(default_factory=list)
  gone: list[float] = dataclasses.field(
    default_factory=list
  )  # time.time() when a client left a stream

  @property
  def last(self) -> protocol.ChatRequest:
    return self.asked[-1]

  async def health(self, request: Request) -> Response:
    self.cold -= 1
    return Response(status_code=503 if self.cold >= 0 else 200)

  async def chat(self, request: Request) -> Response:
    try:
      check_key(request.headers.get("authorization"), [self.key] if self.key else [])
      form = reading.read(await request.body(), protocol.ChatRequest, DEFAULT)
      talk = conversation.of(form.messages)
      self.asked.append(form)
      said = "\n".join(piece for piece in talk.turns[-1].pieces if isinstance(piece, str))
      if said.startswith("refuse"):
        raise ApiError("context_length_exceeded", "the prompt is too long; ask less", "messages")
    except ApiError as error:
      return Response(answers.error(error), error.status, media_type=answers.JSON)
    return StreamingResponse(self.events(said), media_type=answers.STREAM)

  async def events(self, said: str) -> AsyncIterator[bytes]:
    writer = answers.ChatAnswer("tiny")
    kind, _, rest = said.partition(" ")
    done = False
    try:
      yield writer.first(0)
      for i, (text, logged) in enumerate(script(kind, rest)):
        await asyncio.sleep(GAP)
        if i == 2 and kind == "fail":
          yield answers.error_event(ApiError("internal_error", "the engine has failed"))
          break
        if i == 2 and kind == "break":
          done = True
          return
        yield writer.more(0, text, protocol.LogProbabilities([logged]) if logged else None)
      else:
        yield writer.last(0, "length" if kind == "long" else "stop")
        yield writer.counted(PROMPT, [len(TOKENS)])
      done = True
      yield answers.DONE
    finally:
      if not done:
        self.gone.append(time.time())


def script(kind: str, rest: str) -> Iterator[tuple[str, protocol.ChosenToken | None]]:
  """The pieces of an answer: the first word of a question says which."""
  if kind == "say":  # without log probabilities
    yield rest, None
    return
  while True:
    for row in TOKENS:
      yield row[0], chosen(*row)
    if kind != "slow":
      return


@contextlib.contextmanager
def serving(config: config_lib.Config, name: str = "tiny", **fields: Any) -> Iterator[Server]:
  """Runs the server in a thread, on a free port."""
  server = Server(**fields)
  routes = [
    *page.routes(name, config),
    Route("/health", server.health),
    Route("/v1/chat/completions", server.chat, methods=["POST"]),
  ]
  with socket.socket() as place:
    place.bind(("127.0.0.1", 0))
    runner = uvicorn.Server(
      uvicorn.Config(
        Starlette(routes=routes), log_config=None, access_log=False, ws="none", lifespan="off"
      )
    )
    thread = threading.Thread(target=runner.run, args=([place],))
    thread.start()
    while not runner.started:
      time.sleep(0.01)
    server.url = f"http://127.0.0.1:{place.getsockname()[1]}/"
    try:
      yield server
    finally:
      runner.should_exit = runner.force_exit = True
      thread.join(20)
