"""What the `openai` client gets from /v1/chat/completions of a random tiny model, over HTTP."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
from typing import Any

import openai
import pytest

from llava_sp_jax.data.conversation import IMAGE
from llava_sp_jax.infer.requests import Request
from tests.serve.conftest import Real
from tests.serve.live import Live
from tests.serve.pictures import SVG, data_url, encoded, png_of
from tests.serve.requests import body, said, text, user

QUESTION = "what is it?"
GO_ON: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
TOKEN = 200  # an id of the vocabulary


@pytest.fixture(scope="module")
def server(real: Real) -> Live:
  return real.server


def ask(client: openai.OpenAI, *messages: Any, **settings: Any) -> Any:
  """The answer to a question, or to a conversation."""
  talk: Any = list(messages) or [user(QUESTION)]
  return client.chat.completions.create(model="tiny", messages=talk, **settings)


def content(client: openai.OpenAI, *messages: Any, **settings: Any) -> str:
  found = ask(client, *messages, **settings).choices[0].message.content
  assert isinstance(found, str)
  return found


def chunks(client: openai.OpenAI, *messages: Any, **settings: Any) -> list[Any]:
  with ask(client, *messages, stream=True, **settings) as stream:
    return list(stream)


def streamed(found: list[Any], index: int = 0) -> str:
  """The text of one of the answers of a stream."""
  choices = [choice for chunk in found for choice in chunk.choices if choice.index == index]
  return "".join(choice.delta.content or "" for choice in choices)


def picture(content: bytes, kind: str = "image/png") -> dict[str, Any]:
  return {"type": "image_url", "image_url": {"url": data_url(content, kind)}}


PNG = picture(encoded())


def messages_of(request: Request) -> list[dict[str, Any]]:
  """The messages of a client that mean this request."""
  images = iter(request.images)
  turns = [*request.history, (request.question, None)]
  if not any(IMAGE in question for question, _ in turns):
    turns[0] = (f"{IMAGE}\n" * len(request.images) + turns[0][0], turns[0][1])
  found = [said("system", request.system)] if request.system is not None else []
  for question, reply in turns:
    parts: list[Any] = []
    for piece in re.split(f"({IMAGE})\n?", question):
      if piece == IMAGE:
        parts.append(picture(bytes(next(images))))
      elif piece:
        parts.append(text(piece.removesuffix("\n")))
    found.append(user(*parts))
    found += [said("assistant", reply)] if reply is not None else []
  return found


# ---- whole answers ----


def test_answers_are_those_of_the_engine(client: openai.OpenAI, real: Real) -> None:
  """Whole or streamed, bit for bit, with the tokens that it counts."""
  assert len({answer.text for answer in real.answers.values()}) == len(real.answers)
  for request, answer in real.answers.items():
    found = ask(client, *messages_of(request))
    assert found.choices[0].message.content == answer.text
    assert found.choices[0].finish_reason == answer.reason
    usage = (found.usage.prompt_tokens, found.usage.completion_tokens)
    assert usage == (answer.prompt_tokens, answer.tokens)
    assert streamed(chunks(client, *messages_of(request))) == answer.text


def test_tokens_are_counted_as_the_prompt_has_them(server: Live, real: Real) -> None:
  for request, answer in real.answers.items():
    found = server.ask("POST", "/tokenize", body(messages=messages_of(request))).json
    assert found["count"] == len(found["tokens"]) == answer.prompt_tokens
    assert found["max_model_len"] == 4096
    assert (found["tokens"].count(-1) > 0) == bool(request.images)


def test_a_whole_answer(client: openai.OpenAI) -> None:
  found = ask(client)
  assert (found.object, found.model) == ("chat.completion", "tiny")
  assert re.fullmatch(r"chatcmpl-\w+", found.id)
  (choice,) = found.choices
  assert (choice.index, choice.message.role, choice.logprobs) == (0, "assistant", None)
  assert choice.message.refusal is None
  usage = found.usage
  assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_answers_have_ids_of_their_own(client: openai.OpenAI) -> None:
  assert ask(client).id != ask(client).id


def test_a_model_need_not_be_named(server: Live) -> None:
  found = server.ask("POST", "/v1/chat/completions", body()).json
  assert found["model"] == "tiny"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_most_tokens(client: openai.OpenAI, name: str) -> None:
  found = ask(client, **{name: 3}, **GO_ON)
  assert found.usage.completion_tokens == 3
  assert found.choices[0].finish_reason == "length"


def test_an_answer_that_ends_by_itself(client: openai.OpenAI, real: Real) -> None:
  """Its end is a token, too."""
  ends = next(r for r, answer in real.answers.items() if answer.reason == "stop")
  found = ask(client, *messages_of(ends), max_tokens=64)
  assert found.choices[0].finish_reason == "stop"
  logged = ask(client, *messages_of(ends), max_tokens=64, logprobs=True)
  assert found.usage.completion_tokens == len(logged.choices[0].logprobs.content) + 1


def test_the_least_tokens(client: openai.OpenAI, real: Real) -> None:
  ends = next(r for r, answer in real.answers.items() if answer.reason == "stop")
  found = ask(client, *messages_of(ends), max_tokens=30, extra_body={"min_tokens": 30})
  assert found.usage.completion_tokens == 30


def test_seeds(client: openai.OpenAI) -> None:
  def drawn(seed: int | None) -> str:
    return content(client, temperature=1.5, seed=seed, **GO_ON)

  assert drawn(7) == drawn(7)
  assert drawn(-(1 << 63)) == drawn(-(1 << 63))
  assert len({drawn(None) for _ in range(4)}) > 1, "without a seed, each request draws anew"
  assert len({drawn(seed) for seed in range(4)}) > 1


def test_a_temperature_of_0_is_greedy(client: openai.OpenAI) -> None:
  assert content(client, temperature=0) == content(client)
  assert content(client, temperature=0, seed=1) == content(client, temperature=0, seed=2)


@pytest.mark.parametrize(
  "narrow", [{"extra_body": {"top_k": 1}}, {"top_p": 1e-6}, {"extra_body": {"min_p": 1}}], ids=str
)
def test_drawing_from_the_likeliest_alone_is_greedy(
  client: openai.OpenAI, narrow: dict[str, Any]
) -> None:
  assert content(client, temperature=2, seed=1, **narrow) == content(client)


@pytest.mark.parametrize(
  "penalty",
  [
    {"presence_penalty": 2},
    {"frequency_penalty": 2},
    {"extra_body": {"repetition_penalty": 10}},
    {"logit_bias": {str(TOKEN): 5}},
  ],
  ids=str,
)
def test_settings_that_change_an_answer(client: openai.OpenAI, penalty: dict[str, Any]) -> None:
  extra = {"ignore_eos": True, **penalty.get("extra_body", {})}
  given = {**penalty, "extra_body": extra, "max_tokens": 64}
  assert content(client, **given) != content(client, max_tokens=64, **GO_ON)


def test_several_answers(client: openai.OpenAI) -> None:
  settings: Any = {"temperature": 1.5, "seed": 3, **GO_ON}
  found = ask(client, n=3, **settings)
  assert [choice.index for choice in found.choices] == [0, 1, 2]
  texts = [choice.message.content for choice in found.choices]
  assert len(set(texts)) > 1
  assert texts[0] == content(client, **settings), "the first is that of one answer alone"
  assert [c.message.content for c in ask(client, n=3, **settings).choices] == texts
  one = ask(client, **settings).usage
  assert found.usage.prompt_tokens == one.prompt_tokens
  assert found.usage.completion_tokens == 3 * one.completion_tokens


@pytest.mark.parametrize("many", [False, True])
def test_stop_strings(client: openai.OpenAI, many: bool) -> None:
  whole = content(client, max_tokens=40, **GO_ON)
  stop = whole[len(whole) // 2 :][:2]
  found = ask(client, stop=["never said", stop] if many else stop, max_tokens=40, **GO_ON)
  assert found.choices[0].message.content == whole[: whole.index(stop)].strip()
  assert found.choices[0].finish_reason == "stop"


def test_a_stop_string_that_is_not_said(client: openai.OpenAI) -> None:
  assert content(client, stop="never said") == content(client)


def test_stop_token_ids(client: openai.OpenAI) -> None:
  """The token does not belong to the answer."""
  found = ask(
    client, logit_bias={str(TOKEN): 100}, max_tokens=9, extra_body={"stop_token_ids": [TOKEN]}
  )
  assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("", "stop")
  assert found.usage.completion_tokens == 1


# ---- log-probabilities ----


def test_log_probabilities(client: openai.OpenAI) -> None:
  found = ask(client, logprobs=True, top_logprobs=20, max_tokens=6, **GO_ON)
  tokens = found.choices[0].logprobs.content
  assert len(tokens) == 6
  for token in tokens:
    assert token.bytes == list(token.token.encode())
    assert len(token.top_logprobs) == 20
    values = [other.logprob for other in token.top_logprobs]
    assert values == sorted(values, reverse=True)
    assert sum(map(math.exp, values)) <= 1.0001
    assert token.logprob == values[0], "a greedy token is the likeliest one"
    assert token.token == token.top_logprobs[0].token


def test_a_forced_token_has_its_own_probability(client: openai.OpenAI) -> None:
  found = ask(client, logprobs=True, top_logprobs=1, max_tokens=4, logit_bias={str(TOKEN): 100})
  tokens = found.choices[0].logprobs.content
  assert len({token.token for token in tokens}) == 1
  assert all(token.logprob <= token.top_logprobs[0].logprob for token in tokens)


def test_log_probabilities_of_chosen_tokens_alone(client: openai.OpenAI) -> None:
  found = ask(client, logprobs=True, **GO_ON).choices[0].logprobs.content
  assert len(found) == 12
  assert all(token.top_logprobs == [] for token in found)


# ---- streams ----


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"max_tokens": 1},
    {"max_tokens": 64, **GO_ON},
    {"stop": ["e", "t F"], "max_tokens": 40, **GO_ON},
    {"temperature": 1.2, "seed": 5},
    {"logprobs": True, "top_logprobs": 2},
  ],
  ids=str,
)
def test_a_stream_joins_to_the_whole_answer(
  client: openai.OpenAI, settings: dict[str, Any]
) -> None:
  whole = ask(client, **settings).choices[0]
  found = chunks(client, **settings)
  assert streamed(found) == whole.message.content
  assert found[-1].choices[0].finish_reason == whole.finish_reason
  if settings.get("logprobs"):
    parts = [c.choices[0].logprobs for c in found if c.choices[0].logprobs]
    assert [t for part in parts for t in part.content] == whole.logprobs.content


def test_the_chunks_of_a_stream(client: openai.OpenAI) -> None:
  first, *rest = chunks(client, **GO_ON)
  assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
  assert all(chunk.choices[0].delta.role is None for chunk in rest)
  assert len(rest) > 2, "it comes in parts"
  assert {chunk.id for chunk in rest} == {first.id}
  assert {(chunk.object, chunk.model) for chunk in rest} == {("chat.completion.chunk", "tiny")}
  reasons = [chunk.choices[0].finish_reason for chunk in rest]
  assert reasons[-1] == "length"
  assert set(reasons[:-1]) == {None}
  assert not any(chunk.usage for chunk in rest)


def test_usage_ends_a_stream_if_asked_for(client: openai.OpenAI) -> None:
  *rest, last = chunks(client, stream_options={"include_usage": True})
  assert last.choices == []
  assert last.usage == ask(client).usage
  assert all(chunk.usage is None and chunk.choices for chunk in rest)
  *_, last = chunks(client, stream_options={"include_usage": False})
  assert last.choices


def test_a_stream_of_several_answers(client: openai.OpenAI) -> None:
  settings: Any = {"n": 3, "temperature": 1.5, "seed": 3}
  found = chunks(client, **settings)
  whole = ask(client, **settings)
  for choice in whole.choices:
    assert streamed(found, choice.index) == choice.message.content
  ends = [c.index for chunk in found for c in chunk.choices if c.finish_reason]
  assert sorted(ends) == [0, 1, 2]


def test_a_stream_on_the_wire(server: Live) -> None:
  found = server.ask("POST", "/v1/chat/completions", body(stream=True))
  assert found.status == 200
  assert found.headers["content-type"] == "text/event-stream; charset=utf-8"
  assert found.headers["cache-control"] == "no-cache"
  events = found.body.decode().split("\n\n")
  assert events[-2:] == ["data: [DONE]", ""]
  assert all(json.loads(event.removeprefix("data: ")) for event in events[:-2])


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
