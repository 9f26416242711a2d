"""Asks a server with the `openai` client, and reads its answers."""

from __future__ import annotations

import re
from typing import Any

import openai

from llava_sp_jax.data.conversation import IMAGE
from llava_sp_jax.infer.requests import Request
from tests.serve.pictures import data_url, encoded
from tests.serve.requests import said, text, user

QUESTION = "what is it?"
GO_ON: dict[str, Any] = {"extra_body": {"ignore_eos": True}}


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
