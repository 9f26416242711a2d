"""Serves the torch side of eval_throughput.py by OpenAI's protocol: the other side of serving.py.

Starlette in front of transformers' `generate`, one answer at a time: what a script around a
published model does. Streams a chunk for each token. Takes one question with one picture, greedily.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import torch
import torch_loop
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from llava_sp_jax.data import conversation, reading
from llava_sp_jax.data.tokenizer import Tokenizer

TEMPLATE = conversation.TEMPLATES["v1"]


class Streamer:
  """Passes each token of `generate` to the event loop."""

  def __init__(self, loop: asyncio.AbstractEventLoop, tokens: asyncio.Queue[int | None]):
    self._loop, self._tokens = loop, tokens

  def put(self, value: torch.Tensor) -> None:
    for token in value.flatten().tolist():
      self._loop.call_soon_threadsafe(self._tokens.put_nowait, token)

  def end(self) -> None:
    self._loop.call_soon_threadsafe(self._tokens.put_nowait, None)


class Chat:
  """Answers requests, one after another."""

  def __init__(self, model: torch_loop.Model, tokenizer: Tokenizer, size: int):
    self._model, self._tokenizer, self._size = model, tokenizer, size
    self._lock = threading.Lock()

  async def answer(self, http: Request) -> StreamingResponse:
    form = await http.json()
    picture, text = form["messages"][0]["content"]
    data = base64.b64decode(picture["image_url"]["url"].partition(",")[2])
    tokens: asyncio.Queue[int | None] = asyncio.Queue()
    streamer = Streamer(asyncio.get_running_loop(), tokens)
    work = (data, text["text"], form["max_tokens"], streamer)
    threading.Thread(target=self._generate, args=work, daemon=True).start()
    return StreamingResponse(self._chunks(tokens), media_type="text/event-stream")

  def _generate(self, data: bytes, text: str, new: int, streamer: Any) -> None:
    pieces = conversation.prompt(f"{conversation.IMAGE}\n{text}", TEMPLATE)
    ids = [i for run in reading.tokenize(pieces, self._tokenizer) for i in run.ids]
    with self._lock, torch.inference_mode():
      row = [{"image": io.BytesIO(data), "ids": ids}]
      ids, pixels = torch_loop.Questions(row, self._size)[0]
      embeds = self._model.embeds(ids, self._model.encode(pixels))
      mask = torch.ones(embeds.shape[:2], dtype=torch.long)
      self._model.text.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        streamer=streamer,
      )

  async def _chunks(self, tokens: asyncio.Queue[int | None]) -> AsyncGenerator[str, None]:
    count = 0
    while (token := await tokens.get()) is not None:
      count += 1
      delta = {"content": self._tokenizer.decode([token])}
      yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n"
    yield f"data: {json.dumps({'choices': [], 'usage': {'completion_tokens': count}})}\n\n"
    yield "data: [DONE]\n\n"


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("folder", type=Path, help="tower/, text/ and VARIANT.npz")
  parser.add_argument("variant", help="of the projector: none, pooling or cropping")
  parser.add_argument("layers", type=int, help="of the tower that are used")
  parser.add_argument("tokenizer", type=Path)
  parser.add_argument("size", type=int, help="side of the tower's pictures, in pixels")
  parser.add_argument("port", type=int)
  options = parser.parse_args()
  model = torch_loop.Model(options.folder, options.variant, options.layers)
  chat = Chat(model, Tokenizer(options.tokenizer), options.size)
  app = Starlette(routes=[Route("/v1/chat/completions", chat.answer, methods=["POST"])])
  print(f"ready: http://127.0.0.1:{options.port}/v1", flush=True)
  uvicorn.run(app, port=options.port, log_level="warning")


if __name__ == "__main__":
  main()
