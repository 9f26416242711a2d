"""Lists the endpoints of the server, and describes them as an OpenAPI document."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import msgspec

from llava_sp_jax.serve import protocol

Json = dict[str, Any]
JSON, EVENTS, TEXT = "application/json", "text/event-stream", "text/plain"


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Describes one endpoint.

  `form` is the class of its request's body and `answer` that of its answer, None where there is
  none; an answer of class `str` is text. `chunk` is the class of the events of a stream, if the
  answer may be one. `open`: it needs no key, also if the server has one.
  """

  method: Literal["get", "post"]
  path: str
  name: str
  summary: str
  answer: type[msgspec.Struct] | type[str] | None = None
  form: type[msgspec.Struct] | None = None
  chunk: type[msgspec.Struct] | None = None
  open: bool = False


ENDPOINTS = (
  Endpoint(
    "post",
    "/v1/chat/completions",
    "chat",
    "Answers a conversation with pictures",
    protocol.ChatCompletion,
    protocol.ChatRequest,
    protocol.ChatChunk,
  ),
  Endpoint(
    "post",
    "/v1/completions",
    "complete",
    "Answers a question without pictures",
    protocol.TextCompletion,
    protocol.CompletionRequest,
    protocol.TextCompletion,
  ),
  Endpoint("get", "/v1/models", "models", "Lists the models that are served", protocol.Models),
  Endpoint(
    "post",
    "/tokenize",
    "tokenize",
    "Counts the tokens of a prompt, with those of its pictures",
    protocol.Tokenized,
    protocol.TokenizeRequest,
  ),
  Endpoint("get", "/health", "health", "Says whether the server answers: 200, or 503", open=True),
  Endpoint("get", "/ping", "ping", "Is another name of /health", open=True),
  Endpoint("get", "/version", "version", "Names the version", protocol.Version, open=True),
  Endpoint("get", "/metrics", "metrics", "Gives the metrics in Prometheus' format", str, open=True),
)


def document(version: str, root: str = "") -> Json:
  """Returns the OpenAPI document of the server, whose schemas are those of the typed bodies.

  `root` is the path before those of the endpoints, if a proxy puts one there.

  Every request may also get an ErrorBody, with a status of `errors.CODES`.
  """
  structs: set[type] = {protocol.ErrorBody}
  for endpoint in ENDPOINTS:
    structs |= {k for k in (endpoint.answer, endpoint.form, endpoint.chunk) if k is not None}
  _, components = msgspec.json.schema_components(
    sorted(structs - {str}, key=lambda kind: kind.__name__),
    ref_template="#/components/schemas/{name}",
  )
  paths: dict[str, Json] = {}
  for endpoint in ENDPOINTS:
    paths.setdefault(endpoint.path, {})[endpoint.method] = _operation(endpoint)
  return {
    "openapi": "3.2.0",
    "info": {"title": "llava-sp serve", "version": version},
    "servers": [{"url": root or "/"}],
    "paths": paths,
    "components": {
      "schemas": components,
      "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
    },
  }


def _operation(endpoint: Endpoint) -> Json:
  content: Json = {}
  if endpoint.answer is str:
    content[TEXT] = {"schema": {"type": "string"}}
  elif endpoint.answer:
    content[JSON] = {"schema": _reference(endpoint.answer)}
  if endpoint.chunk:
    told = "the JSON of such a chunk or of an ErrorBody, and [DONE] at the end"
    data = {"type": "string", "description": told, "x-chunk": _reference(endpoint.chunk)}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    content[EVENTS] = {"itemSchema": event}
  answers: Json = {
    "200": {"description": "the answer", **({"content": content} if content else {})},
    "default": {
      "description": "an error",
      "content": {JSON: {"schema": _reference(protocol.ErrorBody)}},
    },
  }
  operation: Json = {
    "operationId": endpoint.name,
    "summary": endpoint.summary,
    "responses": answers,
  }
  if endpoint.form:
    body = {"required": True, "content": {JSON: {"schema": _reference(endpoint.form)}}}
    operation["requestBody"] = body
  if not endpoint.open:
    operation["security"] = [{"key": []}, {}]
  return operation


def _reference(kind: type) -> Json:
  return {"$ref": f"#/components/schemas/{kind.__name__}"}
