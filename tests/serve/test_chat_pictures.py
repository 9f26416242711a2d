"""Conversations and pictures that the `openai` client sends, alone and from sixteen clients at once."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import openai
import pytest

from llava_sp_jax.infer.requests import Request
from tests.serve.chat_client import (
  GO_ON,
  PNG,
  QUESTION,
  ask,
  content,
  messages_of,
  picture,
)
from tests.serve.conftest import Real
from tests.serve.live import Live
from tests.serve.pictures import encoded
from tests.serve.requests import said, text, user


@pytest.fixture(scope="module")
def server(real: Real) -> Live:
  return real.server


# ---- conversations and pictures ----


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
@pytest.mark.parametrize("detail", ["auto", "low", "high"])
def test_formats_of_pictures(client: openai.OpenAI, kind: str, detail: str) -> None:
  part = picture(encoded(kind), f"image/{kind.lower()}")
  part["image_url"]["detail"] = detail
  found = ask(client, user(part, text("What?")), max_tokens=1)
  assert found.usage.prompt_tokens == ask(client, user(PNG, text("What?")), max_tokens=1).usage.prompt_tokens  # fmt: skip


def test_pictures_count_in_the_usage(client: openai.OpenAI) -> None:
  none, one, two = (
    ask(client, user(*[PNG] * count, text(QUESTION)), max_tokens=1).usage.prompt_tokens
    for count in range(3)
  )
  assert two - one >= one - none > 36, "36 patches, and spatial tokens"


def test_an_answer_depends_on_its_picture(client: openai.OpenAI, real: Real) -> None:
  one, two = (content(client, user(picture(each), text(QUESTION))) for each in real.pictures)
  assert one != two


def test_the_place_of_pictures_matters(client: openai.OpenAI, real: Real) -> None:
  a, b = map(picture, real.pictures)
  asked = [user(a, text("or"), b), user(b, text("or"), a), user(a, b, text("or"))]
  assert len({content(client, each, **GO_ON) for each in asked}) == 3


def test_a_system_message_replaces_that_of_the_template(client: openai.OpenAI) -> None:
  talk = [said("system", ""), user(QUESTION)]
  assert ask(client, *talk).usage.prompt_tokens < ask(client).usage.prompt_tokens
  for role in ("system", "developer"):
    assert ask(client, said(role, "Be brief."), user(QUESTION)).usage.prompt_tokens


def test_earlier_turns_are_read(client: openai.OpenAI) -> None:
  talk = [user("is it red?"), said("assistant", "yes"), user(QUESTION)]
  assert ask(client, *talk).usage.prompt_tokens > ask(client).usage.prompt_tokens
  other = [user("is it red?"), said("assistant", "no, blue"), user(QUESTION)]
  assert content(client, *talk, **GO_ON) != content(client, *other, **GO_ON)


IGNORED: tuple[dict[str, Any], ...] = (
  {"user": "me"},
  {"metadata": {"a": "b"}},
  {"store": False},
  {"service_tier": "auto"},
  {"reasoning_effort": "low"},
  {"parallel_tool_calls": True},
  {"response_format": {"type": "text"}},
  {"tools": []},
  {"presence_penalty": 0, "frequency_penalty": 0},
  {"top_p": 1, "n": 1},
  {"extra_body": {"top_k": -1, "min_p": 0, "repetition_penalty": 1}},
  {"extra_body": {"a_field_of_the_future": [1]}},
)


@pytest.mark.parametrize("settings", IGNORED, ids=str)
def test_fields_of_clients_that_change_nothing(
  client: openai.OpenAI, settings: dict[str, Any]
) -> None:
  assert content(client, **settings) == content(client)


# ---- many clients ----


def test_sixteen_clients_at_once(server: Live, real: Real) -> None:
  """Each gets what it would get alone, whole or streamed, whatever the others are asking."""
  requests = list(itertools.islice(itertools.cycle(real.answers), 16))

  async def all_of_them() -> list[str]:
    options: Any = {"base_url": f"{server.url}/v1", "api_key": "x", "max_retries": 0}
    async with openai.AsyncOpenAI(**options) as client:

      async def one(number: int, request: Request) -> str:
        talk: Any = messages_of(request)
        if number % 2:
          found = await client.chat.completions.create(model="tiny", messages=talk)
          return found.choices[0].message.content or ""
        parts = await client.chat.completions.create(model="tiny", messages=talk, stream=True)
        return "".join([p.choices[0].delta.content or "" async for p in parts])

      return await asyncio.gather(*(one(*each) for each in enumerate(requests)))

  assert asyncio.run(all_of_them()) == [real.answers[request].text for request in requests]
