"""What the `openai` client gets from /v1/chat/completions over HTTP."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import openai
import pytest

from tests.serve import fake
from tests.serve.fake import FakeService
from tests.serve.live import Live
from tests.serve.pictures import SVG, data_url, encoded, png_of
from tests.serve.requests import said, text, user

PNG = {"type": "image_url", "image_url": {"url": data_url(encoded())}}
QUESTION = "what is to be seen here?"


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


# ---- whole answers ----


def test_a_whole_answer(client: openai.OpenAI) -> None:
  found = ask(client)
  assert (found.object, found.model) == ("chat.completion", "tiny")
  assert re.fullmatch(r"chatcmpl-\w+", found.id)
  (choice,) = found.choices
  assert (choice.index, choice.message.role, choice.logprobs) == (0, "assistant", None)
  assert choice.message.content
  assert choice.finish_reason in ("stop", "length")
  usage = found.usage
  assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_answers_have_ids_of_their_own(client: openai.OpenAI) -> None:
  assert ask(client).id != ask(client).id


def test_the_same_question_has_the_same_answer(client: openai.OpenAI) -> None:
  assert content(client) == content(client)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_the_most_tokens(client: openai.OpenAI, name: str) -> None:
  found = ask(client, **{name: 3}, extra_body={"ignore_eos": True})
  assert found.usage.completion_tokens == 3
  assert found.choices[0].finish_reason == "length"


def test_the_least_tokens(client: openai.OpenAI) -> None:
  found = ask(client, max_tokens=12, extra_body={"min_tokens": 12})
  assert found.usage.completion_tokens == 12


def test_an_answer_without_a_bound_fits_behind_its_prompt(client: openai.OpenAI) -> None:
  """The default is more than is left, so what is left is the bound."""
  long = "word " * (fake.LONGEST - 5)
  found = ask(client, user(long), extra_body={"ignore_eos": True})
  assert found.usage.total_tokens == fake.LONGEST
  assert found.choices[0].finish_reason == "length"


def test_seeds(client: openai.OpenAI) -> None:
  def drawn(seed: int | None) -> str:
    return content(client, temperature=1.5, seed=seed, extra_body={"ignore_eos": True})

  assert drawn(7) == drawn(7)
  assert drawn(-(1 << 63)) == drawn(-(1 << 63))
  assert len({drawn(None) for _ in range(4)}) > 1, "without a seed, each request draws anew"
  assert len({drawn(seed) for seed in range(4)}) > 1


def test_several_answers(client: openai.OpenAI) -> None:
  settings: Any = {"temperature": 1.5, "seed": 3, "extra_body": {"ignore_eos": True}}
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
  settings: Any = {"extra_body": {"ignore_eos": True}}
  whole = content(client, **settings)
  stop = whole.split()[3]
  found = ask(client, stop=["never said", stop] if many else stop, **settings)
  assert found.choices[0].message.content == whole[: whole.index(stop)].strip()
  assert found.choices[0].finish_reason == "stop"


def test_a_stop_string_that_is_not_said(client: openai.OpenAI) -> None:
  assert content(client, stop="never said") == content(client)


def test_stop_token_ids(client: openai.OpenAI) -> None:
  settings: Any = {"ignore_eos": True}
  whole = content(client, extra_body=settings)
  first = fake.WORDS.index(whole.split()[0])
  found = ask(client, extra_body={**settings, "stop_token_ids": [first]})
  assert (found.choices[0].message.content, found.choices[0].finish_reason) == ("", "stop")
  assert found.usage.completion_tokens == 1


def test_a_bias_of_a_token(client: openai.OpenAI) -> None:
  found = content(client, logit_bias={"2": 100}, max_tokens=4, extra_body={"ignore_eos": True})
  assert found == "red red red red"


# ---- log-probabilities ----


def test_log_probabilities(client: openai.OpenAI) -> None:
  found = ask(client, logprobs=True, top_logprobs=3, max_tokens=4, extra_body={"ignore_eos": True})
  tokens = found.choices[0].logprobs.content
  assert len(tokens) == 4
  assert " ".join(t.token for t in tokens) == found.choices[0].message.content
  for token in tokens:
    assert token.bytes == list(token.token.encode())
    assert -9999 <= token.logprob <= 0
    assert len(token.top_logprobs) == 3
    assert all(-9999 <= other.logprob <= 0 for other in token.top_logprobs)


def test_log_probabilities_of_chosen_tokens_alone(client: openai.OpenAI) -> None:
  found = ask(client, logprobs=True).choices[0].logprobs.content
  assert found
  assert all(token.top_logprobs == [] for token in found)


# ---- streams ----


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"max_tokens": 1},
    {"stop": "is"},
    {"stop": ["left of", "😀 a"], "extra_body": {"ignore_eos": True}},
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
  first, *rest = chunks(client)
  assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
  assert all(chunk.choices[0].delta.role is None for chunk in rest)
  assert {chunk.id for chunk in rest} == {first.id}
  assert {(chunk.object, chunk.model) for chunk in rest} == {("chat.completion.chunk", "tiny")}
  reasons = [chunk.choices[0].finish_reason for chunk in rest]
  assert reasons[-1] in ("stop", "length")
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
  body = {"messages": [user(QUESTION)], "stream": True}
  found = server.ask("POST", "/v1/chat/completions", json.dumps(body).encode())
  assert found.status == 200
  assert found.headers["content-type"] == "text/event-stream; charset=utf-8"
  assert found.headers["cache-control"] == "no-cache"
  events = found.body.decode().split("\n\n")
  assert events[-2:] == ["data: [DONE]", ""]
  assert all(event.startswith("data: {") for event in events[:-2])


def test_the_text_comes_while_it_is_written(client: openai.OpenAI, service: FakeService) -> None:
  with ask(client, user("slow please"), stream=True, extra_body={"ignore_eos": True}) as stream:
    next(iter(stream))
    assert not service.tickets[-1].cancelled.is_set()
    assert service.running


# ---- conversations and pictures ----


def test_earlier_turns_and_their_pictures(client: openai.OpenAI, service: FakeService) -> None:
  talk = [
    said("system", "Be brief."),
    user(PNG, text("What is it?")),
    said("assistant", "A square."),
    user(text("And"), PNG, text("this?")),
  ]
  found = ask(client, *talk)
  request = service.asked[-1]
  assert request.history == (("<image>\nWhat is it?", "A square."),)
  assert request.question == "And\n<image>\nthis?"
  assert request.system == "Be brief."
  assert request.images == (encoded(), encoded())
  assert found.usage.prompt_tokens == fake.prompt_tokens(request)


def test_pictures_count_in_the_usage(client: openai.OpenAI) -> None:
  none = ask(client, user(text(QUESTION))).usage.prompt_tokens
  two = ask(client, user(PNG, PNG, text(QUESTION))).usage.prompt_tokens
  assert two == none + 2 * fake.PICTURE


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
@pytest.mark.parametrize("detail", ["auto", "low", "high"])
def test_formats_of_pictures(
  client: openai.OpenAI, service: FakeService, kind: str, detail: str
) -> None:
  url = data_url(encoded(kind), f"image/{kind.lower()}")
  part = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
  assert content(client, user(part, text("What?")))
  assert service.asked[-1].images == (encoded(kind),)


IGNORED: tuple[dict[str, Any], ...] = (
  {"user": "me"},
  {"metadata": {"a": "b"}},
  {"store": False},
  {"service_tier": "auto"},
  {"reasoning_effort": "low"},
  {"parallel_tool_calls": True},
  {"response_format": {"type": "text"}},
  {"tools": []},
  {"presence_penalty": 0.5, "frequency_penalty": -0.5},
  {"top_p": 0.9, "temperature": 0.2},
  {"extra_body": {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1}},
  {"extra_body": {"a_field_of_the_future": [1]}},
)


@pytest.mark.parametrize("settings", IGNORED, ids=str)
def test_fields_of_clients(client: openai.OpenAI, settings: dict[str, Any]) -> None:
  assert content(client, **settings)


def test_settings_reach_the_engine(client: openai.OpenAI, service: FakeService) -> None:
  ask(
    client, temperature=0.5, top_p=0.7, seed=9, stop="x", max_tokens=5, presence_penalty=1,
    frequency_penalty=2, logit_bias={"1": -5}, logprobs=True, top_logprobs=2,
    extra_body={"top_k": 4, "min_p": 0.1, "min_tokens": 2, "repetition_penalty": 1.5,
      "stop_token_ids": [3], "ignore_eos": True},
  )  # fmt: skip
  request = service.asked[-1]
  assert request.number == 0
  assert request.generation == fake.Generation(
    max_new_tokens=5, temperature=0.5, top_p=0.7, seed=9, stop=("x",), presence_penalty=1,
    frequency_penalty=2, logit_bias=((1, -5),), log_probabilities=2, top_k=4, min_p=0.1,
    min_new_tokens=2, repetition_penalty=1.5, stop_ids=(3,), ignore_eos=True,
  )  # fmt: skip


# ---- errors ----

BAD: dict[str, tuple[dict[str, Any], str, str | None]] = {
  # name: (settings, code, param)
  "another model": ({"model": "gpt-4"}, "model_not_found", "model"),
  "no question": ({"messages": []}, "invalid_value", "messages"),
  "a bare URL": (
    {"messages": [user({"type": "image_url", "image_url": "http://a/b"})]},
    "invalid_type",
    "messages[0].content[0].image_url",
  ),
  "temperature": ({"temperature": 3}, "invalid_value", "temperature"),
  "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
  "options without a stream": ({"stream_options": {}}, "invalid_value", "stream_options"),
  "no tokens": ({"max_tokens": 0}, "invalid_value", "max_tokens"),
  "more tokens than there are": (
    {"max_tokens": fake.LONGEST},
    "context_length_exceeded",
    "max_tokens",
  ),
  "a long prompt": (
    {"messages": [user("word " * fake.LONGEST)]},
    "context_length_exceeded",
    "messages",
  ),
  "a long prompt and answer": (
    {"messages": [user("word " * (fake.LONGEST - 5))], "max_tokens": 10},
    "context_length_exceeded",
    "messages",
  ),
  "n": ({"n": 0}, "invalid_value", "n"),
  "many answers": ({"n": 17}, "too_many", "n"),
  "tools": ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
  "a bias of no token": ({"logit_bias": {"99": 1}}, "invalid_value", "logit_bias"),
  "a stop id of no token": (
    {"extra_body": {"stop_token_ids": [12]}},
    "invalid_value",
    "stop_token_ids",
  ),
  "least above most": (
    {"max_tokens": 3, "extra_body": {"min_tokens": 4}},
    "invalid_value",
    "min_tokens",
  ),
  "a picture that is none": (
    {"messages": [user({"type": "image_url", "image_url": {"url": data_url(b"hello")}})]},
    "invalid_image",
    "messages[0].content[0].image_url.url",
  ),
  "an SVG": (
    {"messages": [user({"type": "image_url", "image_url": {"url": data_url(SVG)}})]},
    "invalid_image",
    "messages[0].content[0].image_url.url",
  ),
  "a huge picture": (
    {"messages": [user({"type": "image_url", "image_url": {"url": data_url(png_of(9000, 9000))}})]},
    "image_too_large",
    "messages[0].content[0].image_url.url",
  ),
  "a picture by URL": (
    {"messages": [user({"type": "image_url", "image_url": {"url": "http://127.0.0.1/a"}})]},
    "image_url_refused",
    "messages[0].content[0].image_url.url",
  ),
  "what the engine refuses": ({"messages": [user("refuse this")]}, "invalid_value", "messages"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("settings", "code", "param"), BAD.values(), ids=BAD.keys())
def test_errors_have_their_status(
  client: openai.OpenAI, settings: dict[str, Any], code: str, param: str, stream: bool
) -> None:
  """Also of streams, which begin after the first report of the engine."""
  given: Any = {"model": "tiny", "messages": [user(QUESTION)], "stream": stream, **settings}
  if stream and "stream_options" in settings:
    pytest.skip("that is right")
  expected = openai.NotFoundError if code == "model_not_found" else openai.BadRequestError
  with pytest.raises(expected) as caught:
    client.chat.completions.create(**given)
  error = caught.value
  assert (error.code, error.param) == (code, param), error
  assert error.type in ("invalid_request_error", "not_found_error")
  assert error.request_id


def test_a_failure_of_the_engine(client: openai.OpenAI) -> None:
  with pytest.raises(openai.InternalServerError) as caught:
    ask(client, user("fail now"))
  assert caught.value.code == "internal_error"
  assert "deadbeef" not in str(caught.value), "what went wrong is told to the log alone"


def test_a_bug_of_the_server(client: openai.OpenAI, caplog: pytest.LogCaptureFixture) -> None:
  with pytest.raises(openai.InternalServerError) as caught:
    ask(client, user("crash now"), extra_headers={"x-request-id": "mine-1"})
  assert caught.value.code == "internal_error"
  assert caught.value.request_id == "mine-1"
  assert "mine-1 failed" in caplog.text
  assert "ZeroDivisionError" in caplog.text


def test_a_full_queue(client: openai.OpenAI, service: FakeService) -> None:
  service.full = True
  try:
    with pytest.raises(openai.RateLimitError) as caught:
      ask(client)
  finally:
    service.full = False
  assert caught.value.code == "too_many_requests"
  assert caught.value.response.headers["retry-after"] == "1"


def test_a_queue_that_is_full_for_the_second_answer(
  client: openai.OpenAI, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The first one is not answered either."""
  submit = service.submit

  def once(*given: Any) -> Any:
    monkeypatch.setattr(service, "full", True)
    monkeypatch.setattr(service, "submit", submit)
    service.full = False
    ticket = submit(*given)
    service.full = True
    return ticket

  monkeypatch.setattr(service, "submit", once)
  with pytest.raises(openai.RateLimitError):
    ask(client, user("silent"), n=2)
  assert service.tickets[-1].cancelled.wait(5)
  monkeypatch.setattr(service, "full", False)


def test_a_closed_engine(client: openai.OpenAI, service: FakeService) -> None:
  service.shut = True
  try:
    with pytest.raises(openai.InternalServerError) as caught:
      ask(client)
  finally:
    service.shut = False
  assert (caught.value.status_code, caught.value.code) == (503, "not_ready")


def test_the_client_asks_again_after_a_full_queue(server: Live, service: FakeService) -> None:
  service.full = True

  def free(request: Any) -> None:
    service.full = len(service_tries) < 1
    service_tries.append(request)

  service_tries: list[Any] = []
  with server.client().with_options(max_retries=2) as client:
    client._client.event_hooks = {"request": [free], "response": []}
    assert content(client)
  assert len(service_tries) == 2


def test_many_clients_at_once(server: Live) -> None:
  async def all_of_them() -> list[str]:
    options: Any = {"base_url": f"{server.url}/v1", "api_key": "x", "max_retries": 0}
    async with openai.AsyncOpenAI(**options) as client:

      async def one(number: int) -> str:
        talk: Any = [user(f"question {number % 5}")]
        if number % 2:
          found = await client.chat.completions.create(model="tiny", messages=talk)
          return found.choices[0].message.content or ""
        parts = await client.chat.completions.create(model="tiny", messages=talk, stream=True)
        return "".join([p.choices[0].delta.content or "" async for p in parts])

      return await asyncio.gather(*(one(number) for number in range(40)))

  found = asyncio.run(all_of_them())
  for number, answer in enumerate(found):
    assert answer == found[number % 5]
