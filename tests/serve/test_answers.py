"""Answers as clients read them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from llava_sp_jax.serve import answers, protocol
from llava_sp_jax.serve.answers import ChatAnswer, TextAnswer, Written
from llava_sp_jax.serve.errors import CODES, ApiError

CHOSEN = protocol.LogProbabilities(
  [protocol.ChosenToken("a", -0.5, [97], [protocol.TopToken("a", -0.5, [97])])]
)
TEXT = 'Zwei\n\ndata: [DONE]\r\n"Ü" \u2028 😀'  # all that could end a line


def events(stream: bytes) -> list[Any]:
  """Reads server-sent events as their specification says: a blank line ends one."""
  found = []
  for block in stream.decode().split("\n\n")[:-1]:
    (line,) = block.splitlines() if "\u2028" not in block else [block]
    name, _, value = line.partition(": ")
    assert name == "data"
    found.append(value if value == "[DONE]" else json.loads(value))
  return found


def test_a_whole_answer() -> None:
  writer = ChatAnswer("m", id="chatcmpl-1", created=7)
  written = [Written("a", "stop", 2, CHOSEN), Written("b", "length", 3)]
  found = json.loads(writer.whole(written, 600))
  assert found == {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 7,
    "model": "m",
    "choices": [
      {
        "index": 0,
        "message": {"role": "assistant", "content": "a", "refusal": None},
        "finish_reason": "stop",
        "logprobs": {
          "content": [
            {
              "token": "a",
              "logprob": -0.5,
              "bytes": [97],
              "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
            }
          ],
          "refusal": None,
        },
      },
      {
        "index": 1,
        "message": {"role": "assistant", "content": "b", "refusal": None},
        "finish_reason": "length",
        "logprobs": None,
      },
    ],
    "usage": {"prompt_tokens": 600, "completion_tokens": 5, "total_tokens": 605},
  }


def test_a_stream() -> None:
  writer = ChatAnswer("m")
  pieces = [TEXT[:9], TEXT[9:]]
  stream = b"".join(
    [
      writer.first(0),
      *(writer.more(0, piece, CHOSEN) for piece in pieces),
      writer.last(0, "stop"),
      writer.counted(600, [4]),
      answers.DONE,
    ]
  )
  *chunks, usage, done = events(stream)
  assert done == "[DONE]"
  assert {(c["id"], c["object"], c["created"], c["model"]) for c in (*chunks, usage)} == {
    (writer.id, "chat.completion.chunk", writer.created, "m")
  }
  deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
  assert deltas[0] == {"role": "assistant", "content": ""}
  assert "".join(delta.get("content", "") for delta in deltas) == TEXT
  assert all("role" not in delta for delta in deltas[1:])
  assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
  assert deltas[-1] == {}
  assert chunks[1]["choices"][0]["logprobs"]["content"][0]["token"] == "a"
  assert not any("usage" in chunk for chunk in chunks)
  assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 604)


def test_a_text_completion() -> None:
  writer = TextAnswer("m")
  whole = json.loads(writer.whole([Written(TEXT, "length", 4)], 3))
  assert whole["object"] == "text_completion"
  assert whole["choices"] == [
    {"index": 0, "text": TEXT, "finish_reason": "length", "logprobs": None}
  ]
  stream = writer.more(0, TEXT[:5]) + writer.more(0, TEXT[5:]) + writer.last(0, "length")
  *chunks, usage = events(stream + writer.counted(3, [4]))
  assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
  assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "length"]
  assert (usage["choices"], usage["usage"]) == ([], whole["usage"])


def test_answers_have_names_of_their_own() -> None:
  assert len({ChatAnswer("m").id for _ in range(9)} | {TextAnswer("m").id for _ in range(9)}) == 18


@pytest.mark.parametrize("code", CODES)
def test_errors(code: str) -> None:
  refusal = ApiError(code, "a\nb", "messages[0]")
  found = json.loads(answers.error(refusal))
  assert found == {
    "error": {"message": "a b", "type": refusal.type, "param": "messages[0]", "code": code}
  }
  assert events(answers.error_event(refusal)) == [found]
  assert 400 <= refusal.status < 600
  assert (refusal.status >= 500) == (refusal.type == "server_error")


def test_the_openai_client_reads_answers() -> None:
  chat = pytest.importorskip("openai.types.chat")
  writer = ChatAnswer("m")
  whole = chat.ChatCompletion.model_validate_json(
    writer.whole([Written("a", "stop", 1, CHOSEN)], 2), strict=True
  )
  assert whole.choices[0].message.content == "a"
  for chunk in (writer.first(0), writer.more(0, "a", CHOSEN), writer.last(0, "stop")):
    text = chunk.removeprefix(b"data: ")
    assert chat.ChatCompletionChunk.model_validate_json(text, strict=True).choices[0].index == 0


def test_models_and_tokens() -> None:
  card = protocol.Model(id="m", created=7, owned_by="llava-sp", max_model_len=2048)
  assert json.loads(msgspec.json.encode(protocol.Models(data=[card]))) == {
    "object": "list",
    "data": [
      {"id": "m", "object": "model", "created": 7, "owned_by": "llava-sp", "max_model_len": 2048}
    ],
  }
  assert msgspec.to_builtins(protocol.Tokenized(2, 9, [1, -1])) == {
    "count": 2,
    "max_model_len": 9,
    "tokens": [1, -1],
  }
