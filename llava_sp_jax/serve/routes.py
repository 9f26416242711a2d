"""Answers requests: what each endpoint does, from the body of a request to its response."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Collection, Sequence
from typing import TypeVar

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llava_sp_jax import __version__
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.infer.requests import Answer, Request
from llava_sp_jax.serve import (
  answers,
  bodies,
  conversation,
  openapi,
  pictures,
  protocol,
  reading,
  settings,
)
from llava_sp_jax.serve.access import check_key
from llava_sp_jax.serve.answers import ChatAnswer, TextAnswer, Written
from llava_sp_jax.serve.asked import Asked
from llava_sp_jax.serve.conversation import Conversation
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.fetching import Fetcher
from llava_sp_jax.serve.limits import Limits
from llava_sp_jax.serve.metrics import CONTENT_TYPE, Metrics
from llava_sp_jax.serve.probabilities import written
from llava_sp_jax.serve.served import Served
from llava_sp_jax.serve.state import State
from llava_sp_jax.serve.streaming import EventStream, events, unless_gone

SMALL = 1 << 16  # bytes of a body that is read in the event loop; a larger one in a thread
R = TypeVar("R", bound=msgspec.Struct)


class Endpoints:
  """Has a method for each of `openapi.ENDPOINTS`, with its name."""

  def __init__(
    self, served: Served, limits: Limits, keys: Collection[str], state: State, metrics: Metrics
  ):
    """Prepares the endpoints.

    Args:
      served: the model.
      limits: what clients may send.
      keys: those of clients; without any, everybody may ask.
      state: says whether requests are taken.
      metrics: count answers and errors.
    """
    self._served, self._limits, self._keys = served, limits, keys
    self._state, self._metrics = state, metrics
    self._budget = bodies.Budget(limits.held_bytes)
    self.fetcher: Fetcher | None = None  # belongs to the event loop, so it is made there

  def check_key(self, http: HttpRequest) -> None:
    """Raises: ApiError (401) for a request without a key of this server."""
    check_key(http.headers.get("authorization"), self._keys)

  async def chat(self, http: HttpRequest) -> Response:
    """Answers a conversation."""
    async with contextlib.AsyncExitStack() as held:
      form = await self._read(http, protocol.ChatRequest, held)
      model = reading.check_model(form.model, self._served.names)
      talk = conversation.of(form.messages)
      return await self._answer(http, form, talk, ChatAnswer(model), held)

  async def complete(self, http: HttpRequest) -> Response:
    """Answers a question without pictures."""
    async with contextlib.AsyncExitStack() as held:
      form = await self._read(http, protocol.CompletionRequest, held)
      model = reading.check_model(form.model, self._served.names)
      talk = conversation.of_prompt(form.prompt)
      return await self._answer(http, form, talk, TextAnswer(model), held)

  async def models(self, http: HttpRequest) -> Response:
    """Lists the names of the model."""
    created, longest = self._served.created, self._served.longest
    listed = [
      protocol.Model(id=name, created=created, owned_by="llava-sp", max_model_len=longest)
      for name in self._served.names
    ]
    return _json(protocol.Models(data=listed))

  async def tokenize(self, http: HttpRequest) -> Response:
    """Gives the tokens of a prompt."""
    async with contextlib.AsyncExitStack() as held:
      form = await self._read(http, protocol.TokenizeRequest, held)
      reading.check_model(form.model, self._served.names)
      if form.messages is None:
        talk = conversation.of_prompt(form.prompt or "")
      else:
        talk = conversation.of(form.messages)
      request = await unless_gone(http.receive, self._request(talk))
      try:
        tokens = await asyncio.to_thread(self._served.tokens, request)
      except SampleError as error:
        code = "invalid_image" if request.images else "invalid_value"
        raise ApiError(code, str(error), "messages" if form.messages else "prompt") from None
      return _json(protocol.Tokenized(len(tokens), self._served.longest, list(tokens)))

  async def health(self, http: HttpRequest) -> Response:
    """Says whether requests are taken."""
    self._state.check()
    return Response()

  ping = health

  async def version(self, http: HttpRequest) -> Response:
    """Names the version of this package."""
    return _json(protocol.Version(__version__))

  async def metrics(self, http: HttpRequest) -> Response:
    """Gives the metrics."""
    return Response(self._metrics.text(), headers={"content-type": CONTENT_TYPE})

  async def document(self, http: HttpRequest) -> Response:
    """Gives the OpenAPI document."""
    content = openapi.document(__version__, http.scope.get("root_path", ""))
    return Response(json.dumps(content), media_type=answers.JSON)

  # ---- what they share ----

  async def _read(self, http: HttpRequest, form: type[R], held: contextlib.AsyncExitStack) -> R:
    """Reads a body. Its bytes count as held until `held` ends."""
    held.enter_context(self._state.taking())
    take = held.enter_context(self._budget.share())
    body = await bodies.read(http.stream(), http.headers, self._limits, take)
    if len(body) <= SMALL:
      return reading.read(body, form, self._limits)
    return await asyncio.to_thread(reading.read, body, form, self._limits)

  async def _request(self, talk: Conversation) -> Request:
    """Returns the request of a conversation, with its pictures."""
    return talk.request(await pictures.read(talk.links, self._limits, self.fetcher))

  async def _answer(
    self,
    http: HttpRequest,
    form: protocol.Settings,
    talk: Conversation,
    writer: ChatAnswer | TextAnswer,
    held: contextlib.AsyncExitStack,
  ) -> Response:
    """Returns the response with all answers, or a stream of them.

    The stream begins after the first report of the engine, so that an error of the request still
    has its status. What `held` has ends with the response.
    """
    served, count = self._served, form.n or 1
    deadline = asyncio.get_running_loop().time() + self._limits.request_seconds
    generation = settings.generation(form, served.generation, served.vocabulary, served.longest)
    try:
      async with asyncio.timeout_at(deadline):
        request = await unless_gone(http.receive, self._request(talk))
        asked = Asked(
          served,
          self._metrics,
          [
            dataclasses.replace(request, generation=generation, number=number)
            for number in range(count)
          ],
          flexible=form.most_tokens is None,
          param="messages" if isinstance(form, protocol.ChatRequest) else "prompt",
        )
        held.enter_context(self._state.answering(asked))
        held.enter_context(asked)
        if not form.stream:
          found = await unless_gone(http.receive, asked.answers())
          return Response(_whole(writer, found), media_type=answers.JSON)
        updates = asked.updates()
        first = await unless_gone(http.receive, anext(updates))
    except TimeoutError:
      raise ApiError("answer_timeout", answers.TOO_SLOW) from None
    content = events(first, updates, writer, count, counted=form.includes_usage)
    return EventStream(content, held.pop_all(), deadline, self._metrics)


def _json(value: msgspec.Struct) -> Response:
  return Response(msgspec.json.encode(value), media_type=answers.JSON)


def _whole(writer: ChatAnswer | TextAnswer, found: Sequence[Answer]) -> bytes:
  """Returns the body of all answers, JSON."""
  wanted = [
    Written(
      answer.text,
      answer.reason,
      answer.tokens,
      None if answer.log_probabilities is None else written(answer.log_probabilities),
    )
    for answer in found
  ]
  return writer.whole(wanted, found[0].prompt_tokens)
