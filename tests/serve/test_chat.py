"""What the `openai` client gets from /v1/chat/completions of a random tiny model, over HTTP."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import openai
import pytest

from tests.serve.chat_client import (
  GO_ON,
  ask,
  chunks,
  content,
  messages_of,
  streamed,
)
from tests.serve.conftest import Real
from tests.serve.live import Live
from tests.serve.requests import body

TOKEN = 200  # an id of the vocabulary


@pytest.fixture(scope="module")
def server(real: Real) -> Live:
  return real.server


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
