"""The page behind the real server, with a model of few numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llava_sp_jax.infer.engine import Engine, EngineLayout
from llava_sp_jax.infer.generation import Generation
from llava_sp_jax.infer.service import Service
from llava_sp_jax.serve import checkpoint, page
from llava_sp_jax.serve.limits import Limits
from tests.conftest import ConfigMaker
from tests.infer.tiny import random_model
from tests.serve.live import live
from tests.serve.page.conftest import Opened, Opener
from tests.serve.page.scripted import Server

pytestmark = pytest.mark.slow


def test_a_conversation_about_a_picture(
  open_page: Opener, tiny_config: ConfigMaker, tiny_data: Path
) -> None:
  """Two turns, with a key: margins and counts are there, and no row is left."""
  model = random_model(tiny_config("finetune"))
  few = EngineLayout(suffix=256, capacity=512, share=False)  # few programs
  layout = checkpoint.layout(model.config, Limits(new_tokens=64), few)
  engine = Engine(model, 2, Generation(max_new_tokens=12), layout=layout)
  service = Service(engine)
  served = checkpoint.served(engine, service, ["tiny"], 2)
  with live(
    served, warm_up=service.start, keys=["secret"], pages=page.routes("tiny", model.config)
  ) as server:
    opened: Opened = open_page(Server(url=f"{server.url}/"))
    settings(opened, maxTokens="24", key="secret")
    opened.attach(tiny_data / "images" / "0.png")
    opened.page.set_default_timeout(120_000)  # programs are compiled
    opened.ask("what is it?")
    assert opened.page.locator(".problem").inner_text() == ""
    facts = opened.page.locator(".facts").inner_text()
    assert re.search(r"Smallest margin\n-?[\d.]+", facts)
    written = re.search(r"(\d+) read, (\d+) written", facts)
    assert written
    # The token that ends an answer has no bar.
    assert 0 <= int(written[2]) - opened.page.locator(".bars i").count() <= 1
    first = opened.answer
    opened.ask("and now?")
    assert opened.page.locator(".problem").last.inner_text() == ""
    assert opened.page.locator(".turn .text").first.inner_text() == first
    assert service.running == 0
  service.close()


def settings(opened: Opened, **values: str) -> None:
  opened.page.get_by_role("button", name="Settings").click()
  for name, value in values.items():
    opened.page.locator(f"#{name}").fill(value)
  opened.page.get_by_role("button", name="Done").click()
