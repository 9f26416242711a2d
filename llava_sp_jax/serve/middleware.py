"""Wraps the application: an id for every request, a line in the log, and web pages of others."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_sp_jax.console import shortened
from llava_sp_jax.serve import answers
from llava_sp_jax.serve.errors import HEADERS, ApiError

LOG = logging.getLogger("llava_sp_jax.serve.access")
ID = "x-request-id"
_KNOWN = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)
SHOWN = 200  # characters of a path in the log


def new_id() -> str:
  """Returns the id of a request that has none of its client."""
  return f"req_{secrets.token_hex(16)}"


class Identified:
  """Gives every response an `x-request-id`, the client's if it has a usable one, and logs it."""

  def __init__(self, app: ASGIApp):
    self._app = app

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    """Runs the application; an exception is logged, as its response was sent."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    given = Headers(scope=scope).get(ID, "")
    identity = given if _KNOWN.fullmatch(given) else new_id()
    status, since = 0, time.monotonic()

    async def identified(message: Message) -> None:
      nonlocal status
      if message["type"] == "http.response.start":
        status = message["status"]
        MutableHeaders(scope=message)[ID] = identity
      await send(message)

    try:
      await self._app(scope, receive, identified)
    except Exception:
      LOG.exception("%s failed", identity)
    path, seconds = shortened(scope["path"], SHOWN), time.monotonic() - since
    LOG.info("%s %s %s %d %.3f s", identity, scope["method"], path, status, seconds)


class Cors(CORSMiddleware):
  """Lets web pages of some origins ask from a browser; refuses others with a typed error."""

  def __init__(self, app: ASGIApp, origins: Collection[str]):
    shown = {name for headers in HEADERS.values() for name in headers}
    super().__init__(
      app,
      origins,
      allow_methods=("GET", "POST"),
      allow_headers=("*",),
      expose_headers=(ID, *sorted(shown)),
    )

  def preflight_response(self, request_headers: Headers) -> Response:
    """Answers a browser that asks whether a page may send a request."""
    response = super().preflight_response(request_headers)
    if response.status_code == 200:
      return response
    message = "this server takes no such request from a web page of this origin"
    refusal = answers.error(ApiError("cors_refused", message))
    vary = {"vary": response.headers["vary"]}
    return Response(refusal, response.status_code, vary, answers.JSON)
