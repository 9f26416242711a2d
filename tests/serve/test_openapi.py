"""The OpenAPI document says what the server reads and writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from llava_sp_jax.serve import openapi, protocol, reading
from llava_sp_jax.serve.answers import ChatAnswer, Written, error
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.limits import DEFAULT
from tests.serve.requests import PICTURE, body, said, text, user


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
  found: dict[str, Any] = json.loads(json.dumps(openapi.document("1.2")))
  return found


def references(value: Any) -> Iterator[str]:
  if isinstance(value, dict):
    mapping = value.get("discriminator", {}).get("mapping", {})
    yield from mapping.values()
    yield from (each for key, each in value.items() if key == "$ref")
    for each in value.values():
      yield from references(each)
  elif isinstance(value, list):
    for each in value:
      yield from references(each)


def test_every_reference_is_there(document: dict[str, Any]) -> None:
  schemas = document["components"]["schemas"]
  wanted = {name.removeprefix("#/components/schemas/") for name in references(document)}
  assert wanted == set(schemas)
  assert all(schema["description"] for schema in schemas.values())


def test_every_endpoint_is_there_once(document: dict[str, Any]) -> None:
  names = [(e.method, e.path) for e in openapi.ENDPOINTS]
  found = [(method, path) for path, item in document["paths"].items() for method in item]
  assert sorted(found) == sorted(names)
  assert {e.form for e in openapi.ENDPOINTS if e.form} == set(reading.OTHERS)
  secured = {
    path for path, item in document["paths"].items() for o in item.values() if "security" in o
  }
  assert secured == {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize"}


def test_bodies_are_as_their_schemas_say(document: dict[str, Any]) -> None:
  jsonschema = pytest.importorskip("jsonschema")

  def valid(name: str, content: bytes) -> bool:
    schema = {**document, "$ref": f"#/components/schemas/{name}"}
    checker = jsonschema.Draft202012Validator(schema)
    return bool(checker.is_valid(json.loads(content)))

  talk = [said("system", "a"), user(text("b"), PICTURE), said("assistant", "c"), user("d")]
  for content in (body(), body(messages=talk, temperature=0, stop=["x"], logit_bias={"1": 2})):
    assert valid("ChatRequest", content)
    reading.read(content, protocol.ChatRequest, DEFAULT)
  for wrong in (body(messages=[]), body(temperature=3), body(messages=[said("tool", "x")])):
    assert not valid("ChatRequest", wrong)
    with pytest.raises(ApiError):
      reading.read(wrong, protocol.ChatRequest, DEFAULT)
  writer = ChatAnswer("m")
  assert valid("ChatCompletion", writer.whole([Written("a", "stop", 1)], 2))
  for chunk in (
    writer.first(0),
    writer.more(0, "a"),
    writer.last(0, "stop"),
    writer.counted(1, [1]),
  ):
    assert valid("ChatChunk", chunk.removeprefix(b"data: "))
  assert valid("ErrorBody", error(ApiError("invalid_json", "a")))
  assert not valid("ErrorBody", b"{}")
