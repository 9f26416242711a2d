"""The page around the conversation: history, panels, small screens, themes, and who cannot see or point."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.serve.page.conftest import Opened, Opener, page_config
from tests.serve.page.scripted import TEXT, Server, serving

pytestmark = pytest.mark.slow

PHONE = {"width": 375, "height": 740}
CHATS = "#chats .chat"


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
  with serving(page_config()) as found:
    yield found


@pytest.fixture
def server(shared: Server) -> Server:
  shared.asked.clear()
  return shared


@pytest.fixture
def file(tmp_path: Path) -> Path:
  path = tmp_path / "a.png"
  Image.effect_mandelbrot((60, 40), (-2.0, -1.2, 1.0, 1.2), 40).convert("RGB").save(path)
  return path


def test_chats_and_pictures_stay_in_the_browser(
  open_page: Opener, server: Server, file: Path
) -> None:
  opened = open_page(server)
  page = opened.page
  opened.attach(file)
  opened.ask("first chat")
  page.get_by_role("button", name="New chat").click()
  opened.ask("second chat")
  page.reload()
  page.locator(CHATS).nth(1).wait_for()
  assert page.locator(CHATS).all_inner_texts() == ["second chat", "first chat"]
  page.locator(CHATS, has_text="first").click()
  assert opened.answer == TEXT
  assert page.locator(".turn .picture img").evaluate("image => image.naturalWidth") == 60
  asked = len(server.asked)
  opened.ask("still there?")
  assert len(server.asked) == asked + 1
  assert len(server.last.messages) == 3, "the conversation goes on"


def test_an_answer_that_was_left_is_a_stopped_one(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  opened.ask("slow", wait=False)
  opened.page.locator(".turn .text", has_text="disk").wait_for()
  opened.page.get_by_role("button", name="New chat").click()
  opened.ask("another")
  opened.page.locator(CHATS, has_text="slow").click()
  opened.page.locator(".facts", has_text="stopped").wait_for()
  assert opened.answer.startswith("There is")


def test_chats_are_deleted(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  page = opened.page
  for text in ("one", "two", "three"):
    page.get_by_role("button", name="New chat").click()
    opened.ask(text)
  page.get_by_role("button", name="Delete two").click()
  page.locator(CHATS).nth(2).wait_for(state="detached")
  assert page.locator(CHATS).all_inner_texts() == ["three", "one"]
  assert opened.answer == TEXT, "the chat that is shown stays"
  page.get_by_role("button", name="Delete three").click()
  page.locator("#welcome").wait_for()
  page.get_by_role("button", name="Delete all chats").click()
  assert page.locator(CHATS).count() == 1, "once is not enough"
  page.get_by_role("button", name="Delete them for good?").click()
  page.locator(CHATS).wait_for(state="detached")
  page.reload()
  page.locator("#model", has_text="tiny").wait_for()
  assert page.locator(CHATS).count() == 0


def test_a_chat_that_is_deleted_while_it_is_answered_stays_away(
  open_page: Opener, server: Server
) -> None:
  opened = open_page(server)
  page = opened.page
  opened.ask("slow", wait=False)
  page.locator(CHATS, has_text="slow").wait_for()
  page.get_by_role("button", name="Delete slow").click()
  page.locator("#welcome").wait_for()
  opened.done()
  page.reload()
  page.locator("#model", has_text="tiny").wait_for()
  assert page.locator(CHATS).count() == 0


def test_a_phone_has_everything(open_page: Opener, server: Server, file: Path) -> None:
  opened = open_page(server, viewport=PHONE, has_touch=True)
  page = opened.page
  fits = "document.documentElement.scrollWidth <= innerWidth"
  assert page.evaluate(fits)
  opened.attach(file)
  assert page.locator("#views").is_hidden(), "it does not cover the question"
  opened.ask("what is it? " + "x" * 90)
  assert page.evaluate(fits)
  page.get_by_role("button", name="Picture 1, a.png: what").click()
  page.locator("#views canvas#picture").wait_for()
  assert page.evaluate(fits)
  page.keyboard.press("Escape")
  assert page.locator("#views").is_hidden()
  history = page.get_by_role("button", name="History", exact=True)
  history.click()
  page.locator("#history").wait_for()
  assert history.get_attribute("aria-expanded") == "true"
  assert page.evaluate("document.activeElement.ariaLabel") == "Close the history"
  page.get_by_role("button", name="Close the history").click()
  assert page.evaluate("document.activeElement.id") == "show-history"
  assert history.get_attribute("aria-expanded") == "false"
  page.get_by_role("button", name="Settings").click()
  assert page.evaluate(fits)


def test_panels_open_and_close_as_columns(open_page: Opener, server: Server, file: Path) -> None:
  opened = open_page(server)
  page = opened.page
  views = page.locator("#views")
  assert views.is_hidden(), "there is no picture yet"
  opened.attach(file)
  views.wait_for()
  page.get_by_role("button", name="Close what the model sees").click()
  assert views.is_hidden()
  opened.attach(file)
  assert views.is_hidden(), "who has closed it does not want it"
  page.get_by_role("button", name="Picture 1, a.png: what").click()
  views.wait_for()
  page.get_by_role("button", name="History", exact=True).click()
  assert page.locator("#history").is_hidden()
  page.set_viewport_size(PHONE)
  page.set_viewport_size({"width": 1360, "height": 860})
  assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_is_the_system_s_or_the_user_s(
  open_page: Opener, server: Server, scheme: Any
) -> None:
  opened = open_page(server, color_scheme=scheme)
  page = opened.page
  bright = "getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0] > 128"
  assert page.evaluate(bright) == (scheme == "light")
  other = {"light": "dark", "dark": "light"}[scheme]
  page.get_by_role("button", name="Settings").click()
  page.get_by_label("Appearance").select_option(other)
  assert page.evaluate(bright) == (other == "light")
  page.reload()
  page.locator("#model", has_text="tiny").wait_for()
  assert page.evaluate(bright) == (other == "light")


def test_the_keyboard_reaches_everything(open_page: Opener, server: Server, file: Path) -> None:
  opened = open_page(server)
  page = opened.page
  page.keyboard.press("Tab")
  assert page.evaluate("document.activeElement.className") == "skip"
  page.keyboard.press("Enter")
  assert page.evaluate("document.activeElement.id") == "question"
  opened.attach(file)
  page.locator("#question").focus()
  page.keyboard.type("hello")
  page.keyboard.press("Enter")
  page.locator(".turn .text", has_text="disk").wait_for()
  opened.done()
  assert page.evaluate("document.activeElement.id") == "question", "the focus is not lost"
  reached, unseen = set(), set()
  for _ in range(60):
    page.keyboard.press("Tab")
    name, seen = page.evaluate(
      """() => {
        const at = document.activeElement;
        const outline = getComputedStyle(at).outlineStyle !== "none"
          || at.matches("body, #question, #tokens input");
        return [at.id || at.ariaLabel || at.textContent.trim(), outline];
      }"""
    )
    reached.add(name)
    unseen |= set() if seen else {name}
  expected = {"show-history", "new", "show-views", "show-settings", "question", "add", "Copy"}
  assert reached >= expected | {"Regenerate", "Edit question", "Margins of the tokens", "hello"}
  assert unseen == set(), "one always sees where the focus is"


def violations(page: Any) -> list[str]:
  from axe_playwright_python.sync_playwright import Axe

  found = Axe().run(page).response["violations"]
  return [f"{each['id']}: {[node['html'] for node in each['nodes']]}" for each in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [375, 1360])
def test_axe_finds_nothing(
  open_page: Opener, server: Server, file: Path, scheme: Any, width: int
) -> None:
  pytest.importorskip("axe_playwright_python")
  size = {"width": width, "height": 860}
  opened = open_page(server, color_scheme=scheme, viewport=size, reduced_motion="reduce")
  page = opened.page
  page.locator("#model", has_text="tiny").wait_for(state="attached")
  states = {
    "welcome": lambda: None,
    "attached": lambda: opened.attach(file),
    "answered": lambda: opened.ask("what is it?"),
    "problem": lambda: opened.ask("refuse"),
    "answering": lambda: opened.ask("slow", wait=False),
    "views": lambda: show(opened, width),
    "settings": lambda: settings(opened),
  }
  for name, go in states.items():
    go()
    assert violations(page) == [], name


def show(opened: Opened, width: int) -> None:
  opened.page.keyboard.press("Escape")
  opened.done()
  if width < 960:
    opened.page.get_by_role("button", name="Picture 1, a.png: what").first.click()
  opened.page.locator("#tokens label", has_text="crop 12").click()


def settings(opened: Opened) -> None:
  opened.page.keyboard.press("Escape")
  opened.page.get_by_role("button", name="Settings").click()
