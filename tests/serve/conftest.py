"""Tests of the server: skipped without the extra `serve`, or without the clients that they use."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

NEEDS = ("aiohttp", "msgspec", "prometheus_client", "starlette", "uvicorn", "openai")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []

if not MISSING:
  import openai

  from tests.serve.fake import FakeService, served
  from tests.serve.live import Live, live

  @pytest.fixture(scope="module")
  def service() -> FakeService:
    return FakeService()

  @pytest.fixture(scope="module")
  def server(service: FakeService) -> Iterator[Live]:
    """A server of the fake, for a file of tests."""
    with live(served(service)) as found:
      yield found

  @pytest.fixture(scope="module")
  def client(server: Live) -> Iterator[openai.OpenAI]:
    with server.client() as found:
      yield found
