"""Settings of requests become those of the engine, field by field."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from llava_sp_jax.infer.generation import MOST, Generation
from llava_sp_jax.serve import protocol, reading, settings
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.limits import DEFAULT
from tests.serve.requests import body, chat

SERVER = Generation(max_new_tokens=9, temperature=0.5, top_p=0.9)
VOCABULARY, LONGEST = 100, 50


def of(**fields: Any) -> Generation:
  return settings.generation(chat(body(**fields)), SERVER, VOCABULARY, LONGEST)


def without_seed(found: Generation) -> Generation:
  return dataclasses.replace(found, seed=0)


SET: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
  # name: (fields of the request, what the engine is told beside the server's own settings)
  "nothing": ({}, {}),
  "most": ({"max_completion_tokens": 5}, {"max_new_tokens": 5}),
  "least": ({"min_tokens": 4}, {"min_new_tokens": 4}),
  "least above the server's most": ({"min_tokens": 12}, {"min_new_tokens": 12, "max_new_tokens": 12}),
  "temperature": ({"temperature": 0}, {"temperature": 0.0}),
  "top_p": ({"top_p": 1}, {"top_p": 1.0}),
  "top_k": ({"top_k": 7}, {"top_k": 7}),
  "top_k of all": ({"top_k": -1}, {"top_k": 0}),
  "a huge top_k": ({"top_k": 1 << 30}, {"top_k": MOST}),
  "min_p": ({"min_p": 0.2}, {"min_p": 0.2}),
  "a stop string": ({"stop": "a"}, {"stop": ("a",)}),
  "stop strings": ({"stop": ["a", "b"]}, {"stop": ("a", "b")}),
  "no stop strings": ({"stop": []}, {}),
  "stop ids": ({"stop_token_ids": [3, 99]}, {"stop_ids": (3, 99)}),
  "ignore_eos": ({"ignore_eos": True}, {"ignore_eos": True}),
  "penalties": (
    {"presence_penalty": 1, "frequency_penalty": -2, "repetition_penalty": 1.5},
    {"presence_penalty": 1.0, "frequency_penalty": -2.0, "repetition_penalty": 1.5},
  ),
  "biases": ({"logit_bias": {"3": 1, "4": -100}}, {"logit_bias": ((3, 1.0), (4, -100.0))}),
  "log-probabilities": ({"logprobs": True}, {"log_probabilities": 0}),
  "likeliest tokens": ({"logprobs": True, "top_logprobs": 20}, {"log_probabilities": 20}),
  "no log-probabilities": ({"logprobs": False}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "changes"), SET.values(), ids=SET.keys())
def test_settings(fields: dict[str, Any], changes: dict[str, Any]) -> None:
  assert without_seed(of(**fields)) == dataclasses.replace(SERVER, **changes)


@pytest.mark.parametrize("seed", [0, 7, -(1 << 63), (1 << 63) - 1])
def test_a_seed_is_kept(seed: int) -> None:
  assert of(seed=seed).seed == seed


def test_without_a_seed_every_request_has_its_own() -> None:
  assert len({of().seed for _ in range(20)}) == 20


def test_every_setting_has_a_place() -> None:
  """All fields of Generation but beams, which are not for servers; all fields of a request."""
  told = {field for field, _ in settings.FIELDS.values()}
  assert told == {field.name for field in dataclasses.fields(Generation)} - {"num_beams"}
  others = {"model", "n", "stream", "stream_options", "messages", "max_tokens", "stop", "logprobs"}
  others |= {"max_completion_tokens", "top_logprobs"}
  properties = {"most_tokens", "stops", "log_probabilities"}
  assert {*settings.FIELDS} - properties == {*protocol.ChatRequest.__struct_fields__} - others


@pytest.mark.parametrize(
  ("fields", "code", "param", "says"),
  [
    ({"logit_bias": {"100": 1}}, "invalid_value", "logit_bias", "token id 100"),
    ({"stop_token_ids": [1, 200]}, "invalid_value", "stop_token_ids", "token id 200"),
    ({"max_tokens": 50}, "context_length_exceeded", "max_tokens", "reads and writes 50"),
    ({"min_tokens": 50}, "context_length_exceeded", "max_tokens", "smaller"),
  ],
)
def test_settings_that_are_refused(
  fields: dict[str, Any], code: str, param: str, says: str
) -> None:
  with pytest.raises(ApiError) as caught:
    of(**fields)
  assert (caught.value.code, caught.value.param) == (code, param)
  assert says in str(caught.value)


def test_a_completion_has_the_same_settings() -> None:
  given = json.dumps({"prompt": "a", "max_tokens": 3, "stop": "x"}).encode()
  asked = reading.read(given, protocol.CompletionRequest, DEFAULT)
  found = settings.generation(asked, SERVER, VOCABULARY, LONGEST)
  assert without_seed(found) == dataclasses.replace(SERVER, max_new_tokens=3, stop=("x",))
