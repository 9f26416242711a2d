"""What a server does with an engine that fails, is full, or takes its time; and what it tells it."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest

from tests.serve import fake
from tests.serve.fake import FakeService
from tests.serve.live import Live, wait_until
from tests.serve.pictures import data_url, encoded
from tests.serve.requests import said, text, user

PNG = {"type": "image_url", "image_url": {"url": data_url(encoded())}}
GO_ON: dict[str, Any] = {"extra_body": {"ignore_eos": True}}
CODE = "internal_error"


def ask(client: openai.OpenAI, *messages: Any, **settings: Any) -> Any:
  talk: Any = list(messages) or [user("what is it?")]
  return client.chat.completions.create(model="tiny", messages=talk, **settings)


# ---- what the engine is told ----


def test_settings(client: openai.OpenAI, service: FakeService) -> None:
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


def test_numbers_of_several_answers(client: openai.OpenAI, service: FakeService) -> None:
  before = len(service.asked)
  ask(client, n=3, temperature=1)
  asked = service.asked[before:]
  assert [request.number for request in asked] == [0, 1, 2]
  assert len({request.generation for request in asked}) == 1, "one seed, also if none is sent"


def test_turns_and_their_pictures(client: openai.OpenAI, service: FakeService) -> None:
  talk = [
    said("system", "Be brief."),
    user(PNG, text("What is it?")),
    said("assistant", "A square."),
    user(text("And"), PNG, text("this?")),
  ]
  ask(client, *talk)
  request = service.asked[-1]
  assert request.history == (("<image>\nWhat is it?", "A square."),)
  assert request.question == "And\n<image>\nthis?"
  assert request.system == "Be brief."
  assert request.images == (encoded(), encoded())


# ---- answers that do not fit ----


def test_an_answer_without_a_bound_fits_behind_its_prompt(client: openai.OpenAI) -> None:
  """The server's own bound is more than is left, so what is left is the bound."""
  for stream in (False, True):
    found = ask(
      client, user("word " * (fake.LONGEST - 5)), stream=stream, **GO_ON,
      **({"stream_options": {"include_usage": True}} if stream else {}),
    )  # fmt: skip
    *_, last = found if stream else [found]
    assert last.usage.total_tokens == fake.LONGEST
    assert last.usage.completion_tokens == 4


@pytest.mark.parametrize(
  ("words", "settings"),
  [
    (fake.LONGEST, {}),
    (fake.LONGEST - 5, {"max_tokens": 10}),
    (1, {"max_tokens": fake.LONGEST}),
    (1, {"extra_body": {"min_tokens": fake.LONGEST}}),
  ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_does_not_fit(
  client: openai.OpenAI, words: int, settings: dict[str, Any], stream: bool
) -> None:
  with pytest.raises(openai.BadRequestError) as caught:
    ask(client, user("word " * words), stream=stream, **settings)
  assert caught.value.code == "context_length_exceeded"


def test_what_the_engine_refuses(client: openai.OpenAI) -> None:
  for content, code in (
    ("refuse this", "invalid_value"),
    ([PNG, text("refuse it")], "invalid_image"),
  ):
    with pytest.raises(openai.BadRequestError, match="the picture is unreadable") as caught:
      ask(client, {"role": "user", "content": content})
    assert (caught.value.code, caught.value.param) == (code, "messages")


# ---- failures ----


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine(client: openai.OpenAI, stream: bool) -> None:
  with pytest.raises(openai.InternalServerError) as caught:
    ask(client, user("fail now"), stream=stream)
  assert (caught.value.status_code, caught.value.code) == (500, CODE)
  assert "deadbeef" not in str(caught.value), "what went wrong is told to the log alone"


def test_a_failure_within_a_stream(client: openai.OpenAI, service: FakeService) -> None:
  """It is an event with an error, which the client raises."""
  said = ""
  with pytest.raises(openai.APIError) as caught:  # noqa: PT012
    for chunk in ask(client, user("break it"), stream=True, **GO_ON):
      said += chunk.choices[0].delta.content or ""
  assert said
  assert caught.value.code == CODE


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_of_the_server(
  client: openai.OpenAI, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
  with pytest.raises(openai.InternalServerError) as caught:
    ask(client, user("crash now"), stream=stream, extra_headers={"x-request-id": "mine-1"})
  assert (caught.value.code, caught.value.request_id) == (CODE, "mine-1")
  wait_until(lambda: "mine-1 failed" in caplog.text)  # written behind the response
  assert "ZeroDivisionError" in caplog.text


# ---- a queue that is full, or closed ----


def test_a_full_queue(
  client: openai.OpenAI, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(service, "room", 0)
  with pytest.raises(openai.RateLimitError) as caught:
    ask(client)
  assert caught.value.code == "too_many_requests"
  assert caught.value.response.headers["retry-after"] == "1"


def test_a_queue_without_room_for_the_second_answer(
  client: openai.OpenAI, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
  """The first one is not answered either."""
  monkeypatch.setattr(service, "room", 1)
  with pytest.raises(openai.RateLimitError):
    ask(client, user("silent"), n=2)
  assert service.tickets[-1].cancelled.wait(5)


def test_a_client_asks_again_after_a_full_queue(
  server: Live, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
  """After the seconds that the server says."""
  monkeypatch.setattr(service, "room", 0)
  since = time.monotonic()
  with server.client().with_options(max_retries=2) as client:
    tries = []

    def make_room(request: Any) -> None:
      tries.append(time.monotonic() - since)
      service.room = len(tries) - 1

    client._client.event_hooks = {"request": [make_room], "response": []}
    assert ask(client).choices
  assert len(tries) == 2
  assert tries[1] - tries[0] >= 0.9


def test_a_closed_engine(
  client: openai.OpenAI, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(service, "shut", True)
  with pytest.raises(openai.InternalServerError) as caught:
    ask(client)
  assert (caught.value.status_code, caught.value.code) == (503, "not_ready")


# ---- time ----


def test_text_comes_while_it_is_written(client: openai.OpenAI, service: FakeService) -> None:
  with ask(client, user("slow please"), stream=True, **GO_ON) as stream:
    next(iter(stream))
    assert service.running
