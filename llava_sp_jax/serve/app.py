"""Builds the server's ASGI application from the endpoints."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from llava_sp_jax.serve import answers, openapi
from llava_sp_jax.serve.asked import FAILED
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.fetching import Fetcher
from llava_sp_jax.serve.limits import DEFAULT, Limits
from llava_sp_jax.serve.metrics import Metrics
from llava_sp_jax.serve.middleware import Cors, Identified
from llava_sp_jax.serve.routes import Endpoints
from llava_sp_jax.serve.served import Served
from llava_sp_jax.serve.state import State

DOCUMENT = "/openapi.json"
Handler = Callable[[HttpRequest], Awaitable[Response]]


def application(
  served: Served,
  state: State,
  limits: Limits = DEFAULT,
  *,
  keys: Collection[str] = (),
  origins: Collection[str] = (),
  hosts: Collection[str] = (),
  pages: Collection[Route] = (),
) -> ASGIApp:
  """Returns the application.

  Args:
    served: the model.
    state: says whether requests are taken; the caller changes it.
    limits: what clients may send and ask for.
    keys: those of clients, for endpoints that are not open; without any, everybody may ask.
    origins: of web pages that may ask from a browser ("*": any); none by default.
    hosts: from which pictures are fetched by URL; none by default.
    pages: routes for people, such as those of `page.routes`.
  """
  metrics = Metrics(served)
  endpoints = Endpoints(served, limits, keys, state, metrics)

  @contextlib.asynccontextmanager
  async def lifespan(app: object) -> AsyncIterator[None]:
    endpoints.fetcher = Fetcher(hosts, limits) if hosts else None
    try:
      yield
    finally:
      if endpoints.fetcher is not None:
        await endpoints.fetcher.close()

  def refuse(error: ApiError) -> Response:
    metrics.refused(error.code)
    return Response(answers.error(error), error.status, error.headers, answers.JSON)

  async def refused(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return refuse(error)

  async def unknown(http: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = http.scope["path"]
    if error.status_code != 405:
      known = ", ".join(endpoint.path for endpoint in openapi.ENDPOINTS)
      return refuse(ApiError("not_found", f"no path {path!r}; known: {known}"))
    allowed = (error.headers or {}).get("Allow", "")
    message = f"{path} takes no {http.method}; send {allowed}"
    response = refuse(ApiError("method_not_allowed", message))
    response.headers["allow"] = allowed
    return response

  async def failed(http: HttpRequest, error: Exception) -> Response:
    return refuse(ApiError("internal_error", FAILED))

  async def gone(http: HttpRequest, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it

  routes = [_route(endpoint, endpoints) for endpoint in openapi.ENDPOINTS]
  app = Starlette(
    routes=[*routes, Route(DOCUMENT, endpoints.document), *pages],
    exception_handlers={
      ApiError: refused,
      HTTPException: unknown,
      ClientDisconnect: gone,
      Exception: failed,
    },
    lifespan=lifespan,
  )
  app.router.redirect_slashes = False
  return Identified(Cors(app, origins) if origins else app)


def _route(endpoint: openapi.Endpoint, endpoints: Endpoints) -> Route:
  answer: Handler = getattr(endpoints, endpoint.name)

  async def checked(http: HttpRequest) -> Response:
    endpoints.check_key(http)
    return await answer(http)

  return Route(
    endpoint.path,
    answer if endpoint.open else checked,
    methods=[endpoint.method.upper()],
    name=endpoint.name,
  )
