"""Errors that the `openai` client gets from /v1/chat/completions."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.serve.chat_client import (
  QUESTION,
  ask,
  picture,
)
from tests.serve.conftest import Real
from tests.serve.live import Live
from tests.serve.pictures import SVG, png_of
from tests.serve.requests import said, user


@pytest.fixture(scope="module")
def server(real: Real) -> Live:
  return real.server


# ---- errors ----


def talk(*parts: Any) -> dict[str, Any]:
  return {"messages": [user(*parts)]}


HELD = "messages[0].content[0].image_url.url"  # where the picture of a request stands
BAD: dict[str, tuple[dict[str, Any], str, str | None]] = {
  # name: (settings, code, param)
  "another model": ({"model": "gpt-4"}, "model_not_found", "model"),
  "no question": ({"messages": []}, "invalid_value", "messages"),
  "a bare URL": (talk({"type": "image_url", "image_url": "http://a"}), "invalid_type", HELD[:-4]),
  "temperature": ({"temperature": 3}, "invalid_value", "temperature"),
  "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
  "no tokens": ({"max_tokens": 0}, "invalid_value", "max_tokens"),
  "more tokens than are allowed": ({"max_tokens": 65}, "too_many", "max_tokens"),
  "a long prompt": (talk("word " * 9999), "context_length_exceeded", "messages"),
  "n": ({"n": 0}, "invalid_value", "n"),
  "many answers": ({"n": 17}, "too_many", "n"),
  "tools": ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
  "a bias of no token": ({"logit_bias": {"999": 1}}, "invalid_value", "logit_bias"),
  "a stop id of no token": (
    {"extra_body": {"stop_token_ids": [384]}}, "invalid_value", "stop_token_ids"),
  "least above most": (
    {"max_tokens": 3, "extra_body": {"min_tokens": 4}}, "invalid_value", "min_tokens"),
  "a picture that is none": (talk(picture(b"hello")), "invalid_image", HELD),
  "an SVG": (talk(picture(SVG)), "invalid_image", HELD),
  "half of a picture": (talk(picture(png_of(40, 40))), "invalid_image", "messages"),
  "a huge picture": (talk(picture(png_of(9000, 9000))), "image_too_large", HELD),
  "a picture by URL": (
    talk({"type": "image_url", "image_url": {"url": "http://127.0.0.1/a"}}),
    "image_url_refused", HELD),
  "an answer last": (
    {"messages": [user("a"), said("assistant", "b")]}, "invalid_value", "messages[1].role"),
  "a mark": (talk("an <image>"), "invalid_value", "messages[0].content"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("settings", "code", "param"), BAD.values(), ids=BAD.keys())
def test_errors_have_their_status(
  client: openai.OpenAI, settings: dict[str, Any], code: str, param: str, stream: bool
) -> None:
  """Also of streams, which begin after the first report of the engine."""
  given: Any = {"model": "tiny", "messages": [user(QUESTION)], "stream": stream, **settings}
  expected = openai.NotFoundError if code == "model_not_found" else openai.BadRequestError
  with pytest.raises(expected) as caught:
    client.chat.completions.create(**given)
  error = caught.value
  assert (error.code, error.param) == (code, param), error
  assert error.type in ("invalid_request_error", "not_found_error")
  assert error.request_id


def test_options_of_a_stream_need_one(client: openai.OpenAI) -> None:
  with pytest.raises(openai.BadRequestError) as caught:
    ask(client, stream_options={"include_usage": True})
  assert caught.value.param == "stream_options"
