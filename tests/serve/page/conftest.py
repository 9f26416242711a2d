"""Opens the page in Chromium, and watches what it must never do."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from llava_sp_jax import config as config_lib

if TYPE_CHECKING:
  from playwright.sync_api import Browser, Page

  from tests.serve.page.scripted import Server

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or ""
NEEDS = ("msgspec", "playwright", "starlette", "uvicorn")
MISSING = [name for name in NEEDS if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING or not CHROMIUM else []

WAIT = 20_000  # ms for what comes soon


def page_config(variant: str = "cropping", aspect: str = "pad") -> config_lib.Config:
  """The released model's, whose page needs no weights."""
  return config_lib.Config(
    model=config_lib.ModelConfig(projector=config_lib.ProjectorConfig(variant=variant)),
    data=config_lib.DataConfig(image_aspect=aspect),
  )


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
  from playwright.sync_api import sync_playwright

  with sync_playwright() as playwright:
    found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield found
    found.close()


@dataclasses.dataclass
class Opened:
  """The page in a browser, and the server behind it."""

  page: Page
  server: Server
  problems: list[str]  # errors of scripts, violations of the policy
  others: list[str]  # URLs of other servers that it asked for

  def ask(self, text: str, wait: bool = True) -> None:
    """Asks a question, and waits for the whole answer."""
    self.page.locator("#question").fill(text)
    self.page.locator("#send:enabled").wait_for()  # the model is known
    self.page.keyboard.press("Enter")
    if wait:
      self.done()

  def done(self) -> None:
    self.page.locator("#send").wait_for()

  @property
  def answer(self) -> str:
    """The text of the last answer."""
    return self.page.locator(".turn:last-child .text").inner_text()

  def attach(self, *files: Any) -> None:
    self.page.locator("#files").set_input_files(list(files))
    self.page.locator("#attached li").nth(len(files) - 1).wait_for()


Opener = Callable[..., Opened]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Opener]:
  """`open(server, **context)` opens the page; in the end nothing may have gone wrong."""
  opened: list[Opened] = []
  contexts: list[Any] = []

  def start(server: Server, **options: Any) -> Opened:
    context = browser.new_context(**{"viewport": {"width": 1360, "height": 860}, **options})
    contexts.append(context)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    found = Opened(page, server, [], [])
    page.on("pageerror", lambda error: found.problems.append(str(error)))
    page.on("console", lambda said: note(found, said))
    page.on("request", lambda request: ours(found, request.url))
    page.goto(server.url)
    opened.append(found)
    return found

  yield start
  for context in contexts:
    context.close()
  assert [problem for each in opened for problem in each.problems] == []
  assert [url for each in opened for url in each.others] == []


def note(found: Opened, said: Any) -> None:
  # Chromium reports every status above 399, which is what some of the tests want.
  if said.type == "error" and "Failed to load resource" not in said.text:
    found.problems.append(said.text)


def ours(found: Opened, url: str) -> None:
  if not url.startswith((found.server.url, "blob:", "data:")):
    found.others.append(url)
