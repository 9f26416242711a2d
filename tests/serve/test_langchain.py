"""LangChain's model of chats, unchanged, asks our server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.clients import run
from tests.serve.conftest import Real
from tests.serve.pictures import data_url

PROGRAM = """
import json, sys
from langchain_openai import ChatOpenAI

url, chats = sys.argv[1], json.load(open(sys.argv[2]))
found = []
for messages in chats:
  model = ChatOpenAI(model="tiny", base_url=url, api_key="none", max_retries=0, max_tokens=12)
  whole = model.invoke(messages)
  *chunks, last = model.stream(messages, stream_usage=True)
  total = sum(chunks[1:], chunks[0]) + last
  found.append({
    "whole": whole.text, "streamed": total.text,
    "parts": len(chunks), "reason": whole.response_metadata["finish_reason"],
    "streamed_reason": total.response_metadata["finish_reason"],
    "usage": whole.usage_metadata, "streamed_usage": total.usage_metadata,
    "usages": [bool(chunk.usage_metadata) for chunk in chunks],
  })
  batch = model.batch([messages] * 4)
  found[-1]["batch"] = [each.text for each in batch]
json.dump(found, open(sys.argv[3], "w"))
"""


@pytest.mark.slow
def test_langchain(real: Real, tmp_path: Path) -> None:
  """Whole, streamed and in a batch; the tokens are counted once, at the end of a stream."""
  chats, answers = [], []
  for request, answer in real.answers.items():
    if request.history or len(request.images) > 1:
      continue
    urls = [{"type": "image_url", "image_url": {"url": data_url(bytes(image))}}
            for image in request.images]  # fmt: skip
    content = [*urls, {"type": "text", "text": request.question}]
    chats.append([{"role": "user", "content": content}])
    answers.append(answer)
  assert len(chats) == 2
  (tmp_path / "chats.json").write_text(json.dumps(chats))
  arguments = (f"{real.server.url}/v1", tmp_path / "chats.json", tmp_path / "found.json")
  run("langchain_openai", PROGRAM, *arguments, cwd=tmp_path)
  for found, answer in zip(json.loads((tmp_path / "found.json").read_text()), answers, strict=True):
    assert found["whole"] == found["streamed"] == answer.text
    assert found["batch"] == [answer.text] * 4
    assert found["reason"] == found["streamed_reason"] == answer.reason
    for name in ("usage", "streamed_usage"):
      assert found[name]["input_tokens"] == answer.prompt_tokens
      assert found[name]["output_tokens"] == answer.tokens
    assert found["parts"] > 2
    assert sum(found["usages"]) <= 1
