"""Tests of the server: skipped without the extra `serve`, or without the clients that they use."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import ConfigMaker

if TYPE_CHECKING:
  import openai

  from llava_sp_jax.infer.requests import Answer, Request
  from tests.serve.fake import FakeService
  from tests.serve.live import Live

NEEDS = ("aiohttp", "msgspec", "prometheus_client", "starlette", "uvicorn", "openai")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


@pytest.fixture(scope="module")
def service() -> FakeService:
  from tests.serve.fake import FakeService

  return FakeService()


@pytest.fixture(scope="module")
def server(service: FakeService) -> Iterator[Live]:
  """A server of the fake, for a file of tests."""
  from tests.serve.fake import served
  from tests.serve.live import live

  with live(served(service)) as found:
    yield found


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
  """A client of the server of a file of tests."""
  with server.client() as found:
    yield found


@dataclasses.dataclass
class Real:
  """A server of a random tiny model, and what its engine answers without one."""

  server: Live
  pictures: tuple[bytes, ...]
  answers: dict[Request, Answer]


@pytest.fixture(scope="session")
def real(tiny_config: ConfigMaker, tiny_data: Path) -> Iterator[Real]:
  from llava_sp_jax.infer.engine import Engine, EngineLayout, Generation, Request
  from llava_sp_jax.infer.service import Service
  from llava_sp_jax.serve import checkpoint
  from llava_sp_jax.serve.limits import Limits
  from tests.infer.tiny import random_model
  from tests.serve.live import live

  config = tiny_config("finetune")
  limits = Limits(new_tokens=64)
  # Few programs: one length of prompts, and groups of one or two.
  few = EngineLayout(suffix=256, capacity=512, share=False)
  layout = checkpoint.layout(config, limits, few)
  model = random_model(config)
  model.params["language_model"]["lm_head"]["kernel"] *= 0.2  # so that samples differ
  engine = Engine(model, 2, Generation(max_new_tokens=12), layout=layout)
  pictures = tuple((tiny_data / "images" / f"{i}.png").read_bytes() for i in range(2))
  asked = [
    Request("what is it?"),
    Request("what is it?", pictures[:1]),
    Request("is it\n<image>\nor\n<image>\nthen?", pictures),
    Request("and now?", pictures[:1], "Be brief.", history=(("<image>\nwhat is it?", "red, yes"),)),
  ]
  answers = dict(zip(asked, engine.answer(asked), strict=True))
  service = Service(engine)
  service.start()
  try:
    with live(checkpoint.served(engine, service, ["tiny"], 2), limits) as found:
      yield Real(found, pictures, answers)
  finally:
    service.close()
