"""Requests as clients send them: what is read, ignored, and refused with the name of the field."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tracemalloc
from typing import Any

import hypothesis
import msgspec
import pytest
from hypothesis import strategies as st

from llava_sp_jax.serve import conversation, fields, fields_page, pictures, protocol, reading
from llava_sp_jax.serve.errors import ApiError
from llava_sp_jax.serve.limits import DEFAULT
from tests.conftest import REPOSITORY
from tests.serve.requests import PICTURE, body, chat, said, text, user

# All that the openai client sends to /v1/chat/completions (its version 3.57).
OPENAI = {
  "messages", "model", "audio", "frequency_penalty", "function_call",
  "functions", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens",
  "metadata", "modalities", "moderation", "n", "parallel_tool_calls",
  "prediction", "presence_penalty", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
  "reasoning_effort", "response_format", "safety_identifier", "seed", "service_tier",
  "stop", "store", "stream", "stream_options", "temperature",
  "tool_choice", "tools", "top_logprobs", "top_p", "user",
  "verbosity", "web_search_options",
}  # fmt: skip

READ: dict[str, tuple[dict[str, Any], str, Any]] = {
  # name: (fields, what the request then has, its value)
  "model": ({"model": "m"}, "model", "m"),
  "max_tokens": ({"max_tokens": 5}, "most_tokens", 5),
  "max_completion_tokens": ({"max_completion_tokens": 6}, "most_tokens", 6),
  "both, equal": ({"max_tokens": 7, "max_completion_tokens": 7}, "most_tokens", 7),
  "no bound": ({"max_tokens": None}, "most_tokens", None),
  "temperature": ({"temperature": 0}, "temperature", 0.0),
  "temperature, at most": ({"temperature": 2.0}, "temperature", 2.0),
  "top_p": ({"top_p": 1}, "top_p", 1.0),
  "top_k, all": ({"top_k": -1}, "top_k", -1),
  "min_p": ({"min_p": 0.1}, "min_p", 0.1),
  "the smallest seed": ({"seed": -(1 << 63)}, "seed", -(1 << 63)),
  "the largest seed": ({"seed": (1 << 63) - 1}, "seed", (1 << 63) - 1),
  "a stop string": ({"stop": "\n"}, "stops", ("\n",)),
  "stop strings": ({"stop": ["a", "b"]}, "stops", ("a", "b")),
  "no stop string": ({"stop": None}, "stops", ()),
  "stop_token_ids": ({"stop_token_ids": [2, 0]}, "stop_token_ids", [2, 0]),
  "ignore_eos": ({"ignore_eos": True}, "ignore_eos", True),
  "min_tokens": ({"min_tokens": 3, "max_tokens": 3}, "min_tokens", 3),
  "n": ({"n": 3}, "n", 3),
  "logit_bias": ({"logit_bias": {"50256": -100}}, "logit_bias", {50256: -100.0}),
  "presence_penalty": ({"presence_penalty": -2}, "presence_penalty", -2.0),
  "frequency_penalty": ({"frequency_penalty": 0.5}, "frequency_penalty", 0.5),
  "repetition_penalty": ({"repetition_penalty": 1.1}, "repetition_penalty", 1.1),
  "logprobs": ({"logprobs": True, "top_logprobs": 20}, "top_logprobs", 20),
  "a stream": ({"stream": True}, "includes_usage", False),
  "none of the likeliest": ({"top_logprobs": 0, "logprobs": False}, "log_probabilities", None),
  "a stream with usage": (
    {"stream": True, "stream_options": {"include_usage": True}}, "includes_usage", True),
  "stream options that others have": (
    {"stream": True, "stream_options": {"include_obfuscation": False}}, "includes_usage", False),
  "without effect": ({"user": "me", "store": True, "service_tier": "auto"}, "model", None),
  "unknown": ({"new_in_2027": {"a": [1]}}, "model", None),
  "refused at other values": (
    {"tools": [], "response_format": {"type": "text"}, "tool_choice": "none", "audio": None,
     "skip_special_tokens": True}, "model", None),
}  # fmt: skip


@pytest.mark.parametrize(("given", "name", "value"), READ.values(), ids=READ.keys())
def test_fields_that_are_read(given: dict[str, Any], name: str, value: Any) -> None:
  found = getattr(chat(body(**given)), name)
  assert found == value
  assert type(found) is type(value)


REFUSED: dict[str, tuple[dict[str, Any], str, str, str]] = {
  # name: (fields, code, param, part of the message)
  "no messages": ({"messages": []}, "invalid_value", "messages", "length >= 1"),
  "messages of null": ({"messages": None}, "invalid_type", "messages", "got 'null'"),
  "messages of text": ({"messages": "hi"}, "invalid_type", "messages", "'array'"),
  "a message of text": ({"messages": ["hi"]}, "invalid_type", "messages[0]", "'object'"),
  "no role": ({"messages": [{"content": "x"}]}, "missing_required_parameter", "messages[0].role", "missing"),
  "no content": ({"messages": [{"role": "user"}]}, "missing_required_parameter", "messages[0].content", "missing"),
  "a tool": ({"messages": [said("tool", "x")]}, "invalid_value", "messages[0].role", "known roles: system"),
  "content of null": ({"messages": [{"role": "user", "content": None}]}, "invalid_type", "messages[0].content", "send a text"),
  "no parts": ({"messages": [user()]}, "invalid_value", "messages[0].content", "length >= 1"),
  "a part of text": ({"messages": [user(1)]}, "invalid_type", "messages[0].content[0]", "'object'"),
  "an unknown part": ({"messages": [user({"type": "input_audio"})]}, "invalid_value", "messages[0].content[0].type", "known parts: text, and image_url"),
  "a video": ({"messages": [user(text("a"), {"type": "video_url", "video_url": {"url": "x"}})]}, "invalid_value", "messages[0].content[1].type", "'video_url'"),
  "a bare URL": ({"messages": [user({"type": "image_url", "image_url": "http://x/a.png"})]}, "invalid_type", "messages[0].content[0].image_url", "send {'url'"),
  "no URL": ({"messages": [user({"type": "image_url", "image_url": {}})]}, "missing_required_parameter", "messages[0].content[0].image_url.url", "missing"),
  "an unknown detail": ({"messages": [user({"type": "image_url", "image_url": {"url": "x", "detail": "huge"}})]}, "invalid_value", "messages[0].content[0].image_url.detail", "known: auto, low, high"),
  "a picture of the system": ({"messages": [{"role": "system", "content": [PICTURE]}, user("x")]}, "invalid_value", "messages[0].content[0].type", "image_url of a user"),
  "calls of tools": ({"messages": [user("x"), said("assistant", "") | {"tool_calls": [{}]}]}, "invalid_value", "messages[1].tool_calls", "calls no tools"),
  "temperature of text": ({"temperature": "0"}, "invalid_type", "temperature", "got 'str'"),
  "temperature of true": ({"temperature": True}, "invalid_type", "temperature", "got 'bool'"),
  "temperature above 2": ({"temperature": 2.1}, "invalid_value", "temperature", "<= 2"),
  "temperature below 0": ({"temperature": -0.1}, "invalid_value", "temperature", ">= 0"),
  "top_p of 0": ({"top_p": 0}, "invalid_value", "top_p", "> 0"),
  "top_k of a fraction": ({"top_k": 1.5}, "invalid_type", "top_k", "got 'float'"),
  "max_tokens of 0": ({"max_tokens": 0}, "invalid_value", "max_tokens", ">= 1"),
  "max_tokens of both kinds": ({"max_tokens": 1, "max_completion_tokens": 2}, "invalid_value", "max_tokens", "differ"),
  "max_tokens above the limit": ({"max_tokens": 1 << 20}, "too_many", "max_tokens", "at most 65,536"),
  "max_completion_tokens above the limit": ({"max_completion_tokens": 1 << 20}, "too_many", "max_completion_tokens", "at most 65,536"),
  "min_tokens above max_tokens": ({"min_tokens": 9, "max_tokens": 8}, "invalid_value", "min_tokens", "9 is more than max_tokens 8"),
  "a seed of 64 bits without sign": ({"seed": 1 << 63}, "invalid_value", "seed", "<="),
  "n of 0": ({"n": 0}, "invalid_value", "n", ">= 1"),
  "n above the limit": ({"n": 17}, "too_many", "n", "at most 16"),
  "21 top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs", "<= 20"),
  "top_logprobs alone": ({"top_logprobs": 1}, "invalid_value", "top_logprobs", "logprobs: true"),
  "stream_options alone": ({"stream_options": {}}, "invalid_value", "stream_options", "stream: true"),
  "an empty stop string": ({"stop": ["a", ""]}, "invalid_value", "stop", "empty"),
  "17 stop strings": ({"stop": ["a"] * 17}, "too_many", "stop", "at most 16"),
  "a long stop string": ({"stop": "a" * 1025}, "too_many", "stop", "at most 1,024"),
  "a stop of numbers": ({"stop": [1]}, "invalid_type", "stop[0]", "'str'"),
  "many stop ids": ({"stop_token_ids": [1] * 129}, "too_many", "stop_token_ids", "at most 128"),
  "a bias of 101": ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias", "<= 100"),
  "a bias of a word": ({"logit_bias": {"dog": 1}}, "invalid_type", "logit_bias", "'int'"),
  "a penalty of 3": ({"presence_penalty": 3}, "invalid_value", "presence_penalty", "<= 2"),
  "tools": ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools", "calls no tools; leave it out"),
  "a forced tool": ({"tool_choice": "required"}, "unsupported_value", "tool_choice", "known: 'none', 'auto'"),
  "JSON mode": ({"response_format": {"type": "json_object"}}, "unsupported_value", "response_format", "free text"),
  "speech": ({"modalities": ["text", "audio"]}, "unsupported_value", "modalities", "text"),
  "probabilities of the prompt": ({"prompt_logprobs": 0}, "unsupported_value", "prompt_logprobs", "leave it out"),
  "a search": ({"web_search_options": {}}, "unsupported_value", "web_search_options", "does not search"),
  "beams": ({"use_beam_search": True}, "unsupported_parameter", "use_beam_search", "beams"),
  "another template": ({"chat_template": "{{ x }}"}, "unsupported_parameter", "chat_template", "as in training"),
  "special tokens in answers": ({"skip_special_tokens": False}, "unsupported_value", "skip_special_tokens", "known: True"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "code", "param", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_fields_that_are_refused(given: dict[str, Any], code: str, param: str, says: str) -> None:
  with pytest.raises(ApiError) as caught:
    chat(body(**given))
  error = caught.value
  assert (error.code, error.param, says in str(error)) == (code, param, True), error
  assert (error.status, error.type) == (400, "invalid_request_error")


def test_every_field_of_the_openai_client_has_a_place() -> None:
  known = {*protocol.ChatRequest.__struct_fields__, *fields.CHAT}
  assert known >= OPENAI
  assert not {*protocol.ChatRequest.__struct_fields__} & {*fields.CHAT}


def test_the_page_of_fields_is_up_to_date() -> None:
  """`python -m llava_sp_jax.serve.fields_page > docs/request_fields.md` makes it anew."""
  assert (REPOSITORY / "docs/request_fields.md").read_text() == fields_page.page()


@pytest.mark.parametrize("form", reading.OTHERS)
def test_a_field_has_one_place(form: type[msgspec.Struct]) -> None:
  assert not {*form.__struct_fields__} & {*reading.OTHERS[form]}


MANY = 10**6
ATTACKS: dict[str, tuple[bytes, str]] = {
  "nothing": (b"", "invalid_json"),
  "no object": (b"[]", "invalid_type"),
  "a text": (b'"messages"', "invalid_type"),
  "half of an object": (b'{"messages": [', "invalid_json"),
  "two objects": (body() + body(), "invalid_json"),
  "a mark of byte order": (b"\xef\xbb\xbf" + body(), "invalid_json"),
  "UTF-16": (body().decode().encode("utf-16"), "invalid_json"),
  "broken UTF-8": (body(messages=[user("XX")]).replace(b"XX", b"\xff\xfe"), "invalid_json"),
  "half of a surrogate": (body(messages=[user("XX")]).replace(b"XX", b"\\ud800"), "invalid_json"),
  "not a number": (body(top_p=float("nan")), "invalid_json"),
  "infinity": (body(temperature=1).replace(b": 1", b": 1e999"), "invalid_value"),
  "a number of a million digits": (body(seed=1).replace(b": 1}", b": " + b"9" * MANY + b"}"), "too_many"),
  "digits in place of messages": (b'{"messages": ' + b"9" * MANY + b"}", "invalid_value"),
  "digits in place of a text": (b'{"messages": [{"role": "user", "content": ' + b"9" * MANY + b"}]}", "invalid_value"),
  "digits alone": (b"9" * MANY, "invalid_value"),
  "a long fraction": (b'{"temperature": 0.' + b"1" * 60_000 + b"}", "missing_required_parameter"),
  "deep lists": (b'{"new": ' + b"[" * MANY + b"]" * MANY + b"}", "invalid_json"),
  "deep objects": (b'{"new": ' + b'{"a":' * 90_000, "invalid_json"),
  "deep lists in a known field": (b'{"tools": ' + b"[" * MANY, "invalid_json"),
  "a million objects": (b'{"messages": [' + b"{}," * MANY, "invalid_json"),
  "a million parts": (body(messages=[user(text("X"))]).replace(b'{"type"', b'{"type":"text","text":"ab"},' * MANY + b'{"type"'), "request_too_large"),
  "30,000 parts": (body(messages=[user(*[text("ab")] * 30_000)]), "too_many"),
  "40,000 messages": (body(messages=[user("ab")] * 40_000), "too_many"),
  "a million stop strings": (body(stop=["ab"] * MANY), "request_too_large"),
  "a million biases": (body(logit_bias=dict.fromkeys(range(MANY), 1)), "request_too_large"),
  "a million names": (b"{" + b",".join(b'"k%d":1' % i for i in range(MANY)) + b"}", "request_too_large"),
  "a role of 20 MB": (body(messages=[said("x" * 20_000_000, "a")]), "invalid_value"),
  "a role like our messages": (body(messages=[said(" - at `$.a`" * (MANY // 3) + "\n", "a")]), "invalid_value"),
  "a long detail": (body(messages=[user({"type": "image_url", "image_url": {"url": "a", "detail": "`" * MANY}})]), "invalid_value"),
  "100,000 stop strings": (body(stop=["ab"] * 100_000), "too_many"),
  "100,000 names": (b"{" + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"}", "missing_required_parameter"),
  "100,000 names in a refused field": (body(tools={f"k{i}": 1 for i in range(100_000)}), "too_many"),
  "lists in a list": (body(messages=[said("assistant", "") | {"tool_calls": [[]] * 200_000}]), "invalid_value"),
  "5 MB of text": (body(messages=[user("a b\n" * 1_000_000)]), "request_too_large"),
  "20 MB of text that looks like a picture": (body(messages=[user("a" * 20_000_000)]), "too_many"),
  "wide characters": (body(messages=[user("a" * 30_000_000 + "\N{GRINNING FACE}")]), "request_too_large"),
  "wide characters in a role": (body(messages=[said("\N{GRINNING FACE}" + "a" * 30_000_000, "")]), "request_too_large"),
  "wide characters behind a quote": (body(messages=[user("\N{GRINNING FACE}" + '"' + "a" * 30_000_000)]), "request_too_large"),
  "wide characters before a quote": (body(messages=[user("a" * 30_000_000 + '"\N{GRINNING FACE}')]), "request_too_large"),
  "wide characters in UTF-8": ('{"messages": "😀'.encode() + b"a" * 30_000_000 + b'"}', "request_too_large"),
  "40 MB": (body(messages=[user("a" * 40_000_000)]), "request_too_large"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "code"), ATTACKS.values(), ids=ATTACKS.keys())
def test_hostile_bodies(content: bytes, code: str) -> None:
  tracemalloc.start()
  with pytest.raises(ApiError) as caught:
    chat(content)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert caught.value.code == code, caught.value
  assert 400 <= caught.value.status < 500
  assert len(str(caught.value)) <= 500
  assert peak < 100 << 20  # bytes, beside the body itself


VALUES = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
  max_leaves=6,
)
PARTS = st.fixed_dictionaries(
  {"type": st.sampled_from(["text", "image_url", "file"])},
  optional={"text": st.text(), "image_url": st.fixed_dictionaries({"url": st.text()}) | VALUES},
)
MESSAGES = st.fixed_dictionaries(
  {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool"])},
  optional={"content": st.text() | st.lists(PARTS, max_size=3) | VALUES, "tool_calls": VALUES},
)


@hypothesis.settings(max_examples=100, deadline=None)
@hypothesis.given(
  form=st.sampled_from(list(reading.OTHERS)),
  messages=st.lists(MESSAGES, max_size=4),
  given=st.dictionaries(
    st.sampled_from(sorted({*OPENAI, *fields.CHAT, "prompt", "stop_token_ids"})), VALUES, max_size=4
  ),
)
def test_any_json_is_read_or_refused_by_name(
  form: type[msgspec.Struct], messages: list[Any], given: dict[str, Any]
) -> None:
  with contextlib.suppress(ApiError):
    request = reading.read(json.dumps({"messages": messages, **given}).encode(), form, DEFAULT)
    if isinstance(request, protocol.ChatRequest):
      for url, param in conversation.of(request.messages).links:
        pictures.inline(url, param, DEFAULT)


@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(data=st.binary(max_size=40), at=st.integers(0, 300))
def test_any_bytes_are_read_or_refused(data: bytes, at: int) -> None:
  good = body(messages=[user(text("a"), PICTURE)], stream=True, stop=["b"], logit_bias={"1": 1})
  with contextlib.suppress(ApiError):
    chat(good[:at] + data + good[at + len(data) :])


@pytest.mark.parametrize("question", ["Was ist das? \U0001f600", 'a "b" \\', ""])
@pytest.mark.parametrize("ascii_alone", [True, False])
def test_large_pictures_are_no_text(question: str, ascii_alone: bool) -> None:
  url = "data:image/png;base64," + "A" * 6_000_000
  parts = user(text(question), {"type": "image_url", "image_url": {"url": url}}, PICTURE)
  content = json.dumps({"messages": [parts]}, ensure_ascii=ascii_alone).encode()
  found = conversation.of(chat(content).messages)
  assert [link for link, _ in found.links] == [url, PICTURE["image_url"]["url"]]


def test_counts_of_messages_and_parts() -> None:
  limits = dataclasses.replace(DEFAULT, messages=2, parts=3, characters=9)
  pair = [user(text("a"), text("b")), user(text("c"))]
  assert len(chat(body(messages=pair), limits).messages) == 2
  for messages, says in (
    ([user("a")] * 3, "3 messages; at most 2"),
    ([*pair[:1], pair[0]], "4 parts of messages; at most 3"),
    ([user("a" * 10)], "10 characters of text; at most 9"),
    ([user(text("a" * 5)), user(text("b" * 5), PICTURE)], "10 characters of text; at most 9"),
  ):
    with pytest.raises(ApiError, match=says):
      chat(body(messages=messages), limits)


def test_other_endpoints() -> None:
  ask = reading.read(b'{"prompt": "Hi", "max_tokens": 2}', protocol.CompletionRequest, DEFAULT)
  assert (ask.prompt, ask.most_tokens) == ("Hi", 2)
  count = reading.read(body(), protocol.TokenizeRequest, DEFAULT)
  assert count.messages is not None
  for content, form, says in (
    ({"prompt": "a", "logprobs": 1}, protocol.CompletionRequest, "logprobs is not supported"),
    ({"prompt": ["a"]}, protocol.CompletionRequest, "prompt: Expected 'str'"),
    ({"prompt": "a" * 2_000_000}, protocol.CompletionRequest, "2,000,000 characters of text"),
    ({}, protocol.TokenizeRequest, "one of prompt and messages"),
    ({"prompt": "a", "messages": [user("b")]}, protocol.TokenizeRequest, "one of prompt and"),
  ):
    with pytest.raises(ApiError, match=says):
      reading.read(json.dumps(content).encode(), form, DEFAULT)


def test_models_that_are_served() -> None:
  assert reading.check_model(None, ["a", "b"]) == "a"
  assert reading.check_model("b", ["a", "b"]) == "b"
  with pytest.raises(ApiError, match="no model 'c'; served here: a, b") as caught:
    reading.check_model("c", ["a", "b"])
  assert (caught.value.status, caught.value.param) == (404, "model")
