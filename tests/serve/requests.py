"""Bodies of requests."""

from __future__ import annotations

import json
from typing import Any

from llava_sp_jax.serve import protocol, reading
from llava_sp_jax.serve.limits import DEFAULT, Limits

PICTURE: dict[str, Any] = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def text(content: str) -> dict[str, Any]:
  return {"type": "text", "text": content}


def user(*parts: Any) -> dict[str, Any]:
  """A message of the user: one text, or parts."""
  content = parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)
  return {"role": "user", "content": content}


def said(role: str, content: str) -> dict[str, Any]:
  return {"role": role, "content": content}


def body(**values: Any) -> bytes:
  """A chat request with a question, unless `messages` say another one."""
  return json.dumps({"messages": [user("Hi?")], **values}).encode()


def chat(content: bytes, limits: Limits = DEFAULT) -> protocol.ChatRequest:
  return reading.read(content, protocol.ChatRequest, limits)
