"""A judge's server, and the endpoint that asks it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from llava_sp_jax.tasks.judge import Endpoint
from tests.tasks.judge_server import KEY, Server


@pytest.fixture
def server() -> Iterator[Server]:
  made = Server()
  thread = threading.Thread(target=made.serve_forever, args=(0.01,))
  thread.start()
  yield made
  made.shutdown()
  made.server_close()
  thread.join()


@pytest.fixture
def waits() -> list[float]:
  return []


@pytest.fixture
def endpoint(server: Server, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> Endpoint:
  monkeypatch.setenv("JUDGE_KEY", KEY)
  url = f"http://127.0.0.1:{server.server_address[1]}/v1/"
  return Endpoint(url, "grader", "JUDGE_KEY", tries=3, seconds=10, pause=waits.append)
