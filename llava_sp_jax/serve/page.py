"""Serves the page: static files that load nothing from elsewhere, and what they say of the model."""

from __future__ import annotations

import hashlib
import importlib.resources

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from llava_sp_jax import config as config_lib
from llava_sp_jax.serve import views

SCRIPTS = (
  "answers",
  "attachments",
  "chat",
  "client",
  "dom",
  "page",
  "panels",
  "pictures",
  "settings",
  "store",
  "views",
)
# File under serve/page -> (path on the server, media type). Paths in the files are relative, so the
# page also works below the root path of a proxy.
FILES = {
  "index.html": ("/", "text/html; charset=utf-8"),
  "style.css": ("/page/style.css", "text/css; charset=utf-8"),
  "icon.svg": ("/page/icon.svg", "image/svg+xml"),
  **{f"{name}.js": (f"/page/{name}.js", "text/javascript; charset=utf-8") for name in SCRIPTS},
}
MODEL = "/page/model.json"

# Scripts and styles are files of this server alone: no inline ones, no eval, no text that becomes
# markup. Pictures are the page's own, which never were on the network.
POLICY = {
  "default-src": "'none'",
  "script-src": "'self'",
  "style-src": "'self'",
  "img-src": "'self' blob:",
  "connect-src": "'self'",
  "base-uri": "'none'",
  "form-action": "'none'",
  "frame-ancestors": "'none'",
  "require-trusted-types-for": "'script'",
  "trusted-types": "'none'",
}
HEADERS = {
  "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
  "Cache-Control": "no-cache",  # asked for again with the ETag: another model, another version
}


def routes(name: str, config: config_lib.Config) -> list[Route]:
  """Returns the routes of the page of a model that is served as `name`.

  Raises: ConfigError for a config without a valid model.
  """
  folder = importlib.resources.files("llava_sp_jax.serve") / "page"
  described = msgspec.json.encode(views.describe(name, config))
  return [
    *(_route(path, (folder / file).read_bytes(), kind) for file, (path, kind) in FILES.items()),
    _route(MODEL, described, "application/json"),
  ]


def _route(path: str, content: bytes, kind: str) -> Route:
  tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
  headers = {**HEADERS, "ETag": tag}

  async def send(request: Request) -> Response:
    known = request.headers.get("if-none-match", "")
    if tag in (each.strip().removeprefix("W/") for each in known.split(",")):
      return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=kind)

  return Route(path, send, methods=["GET"])
