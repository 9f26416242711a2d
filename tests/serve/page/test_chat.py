"""Conversations on the page: asking, stopping, asking again, settings, and what goes wrong."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from llava_sp_jax.serve import protocol
from tests.serve.page.conftest import Opener, page_config
from tests.serve.page.scripted import SMALLEST, TEXT, TOKENS, Server, serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared() -> Iterator[Server]:
  with serving(page_config()) as found:
    yield found


@pytest.fixture
def server(shared: Server) -> Server:
  shared.asked.clear()
  shared.gone.clear()
  shared.key = ""
  return shared


def said(form: protocol.ChatRequest) -> list[tuple[str, Any]]:
  """(role, texts) of each message."""
  return [
    (
      type(message).__name__.removesuffix("Message").lower(),
      message.content
      if isinstance(message.content, str)
      else [part.text for part in message.content if isinstance(part, protocol.TextPart)],
    )
    for message in form.messages
  ]


def setting(opened: Any, **values: str) -> None:
  opened.page.get_by_role("button", name="Settings").click()
  for name, value in values.items():
    opened.page.locator(f"#{name}").fill(value)
  opened.page.get_by_role("button", name="Done").click()


def test_the_page_opens_with_the_model_and_examples(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  page = opened.page
  page.get_by_text("tiny · cropping").wait_for()
  assert page.title() == "tiny · LLaVA-SP"
  assert page.locator("#examples button").count() == 3
  assert page.locator("#send").is_disabled(), "there is no question yet"


def test_a_question_is_answered_as_it_is_streamed(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  opened.page.evaluate(
    """() => {
      window.seen = [];
      new MutationObserver(() => {
        const text = document.querySelector(".turn .text")?.textContent;
        if (text && text !== seen.at(-1)) seen.push(text);
      }).observe(document.getElementById("turns"), {childList: true, subtree: true, characterData: true});
    }"""
  )
  opened.ask("What is it?")
  assert opened.answer == TEXT
  seen = opened.page.evaluate("seen")
  assert len(seen) >= 4, "it comes in parts"
  assert all(TEXT.startswith(text) for text in seen)
  form = server.last
  assert said(form) == [("user", ["What is it?"])]
  assert (form.stream, form.logprobs, form.top_logprobs) == (True, True, 2)
  assert (form.temperature, form.top_p, form.max_tokens, form.seed) == (0, 1, None, None)
  assert form.model == "tiny"
  assert opened.page.locator("#status").inner_text() == TEXT, "a screen reader is told"


def test_enter_sends_and_shift_enter_does_not(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  page = opened.page
  page.locator("#question").click()
  page.keyboard.type("one")
  page.keyboard.press("Shift+Enter")
  page.keyboard.type("two")
  assert not server.asked
  page.keyboard.press("Enter")
  opened.page.locator(".turn .text", has_text="disk").wait_for()
  assert said(server.last) == [("user", ["one\ntwo"])]
  assert page.locator("#question").input_value() == ""


def test_several_turns_are_one_conversation(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  setting(opened, system="Be brief.")
  opened.ask("first")
  opened.ask("second")
  assert said(server.last) == [
    ("system", "Be brief."),
    ("user", ["first"]),
    ("assistant", TEXT),
    ("user", ["second"]),
  ]
  assert opened.page.locator(".turn").count() == 2


@pytest.mark.parametrize("key", ["", "Escape"])
def test_stopping_frees_the_row_at_once(open_page: Opener, server: Server, key: str) -> None:
  opened = open_page(server)
  opened.ask("slow", wait=False)
  opened.page.locator(".turn .text", has_text="disk").wait_for()
  # By the clock of the page: that the browser is told to press takes time, too.
  opened.page.evaluate(
    """() => {
      const note = () => (window.pressed ??= Date.now() / 1000);
      for (const kind of ["click", "keydown"]) document.addEventListener(kind, note, true);
    }"""
  )
  if key:
    opened.page.keyboard.press(key)
  else:
    opened.page.get_by_role("button", name="Stop").click()
  opened.done()
  end = time.monotonic() + 5
  while not server.gone and time.monotonic() < end:
    time.sleep(0.005)
  assert server.gone[0] - opened.page.evaluate("pressed") < 0.2
  opened.page.locator(".facts", has_text="stopped").wait_for()
  text = opened.answer
  assert text.startswith(TEXT[:20])
  opened.ask("and then?")
  assert said(server.last)[1] == ("assistant", text), "what was said stays part of the conversation"


def test_regenerating_keeps_the_answers_before(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  page = opened.page
  opened.ask("slow", wait=False)
  page.locator(".turn .text", has_text="disk").wait_for()
  page.keyboard.press("Escape")
  opened.done()
  short = opened.answer
  page.get_by_role("button", name="Regenerate").click()
  page.locator(".turn .text", has_text=TEXT + TEXT).wait_for()
  page.keyboard.press("Escape")
  opened.done()
  assert said(server.last) == [("user", ["slow"])]
  assert page.locator(".place").inner_text() == "2 of 2"
  page.get_by_role("button", name="Previous answer").click()
  assert page.locator(".place").inner_text() == "1 of 2"
  assert opened.answer == short
  opened.ask("go on")
  assert said(server.last)[1] == ("assistant", short), "the answer that is shown counts"


def test_a_question_can_be_edited(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  opened.ask("first")
  opened.ask("secnod")
  opened.page.get_by_role("button", name="Edit question").last.click()
  assert opened.page.locator("#question").input_value() == "secnod"
  assert opened.page.locator(".turn").count() == 1
  opened.ask("second")
  assert [text for _, text in said(server.last)] == [["first"], TEXT, ["second"]]


def test_samples_have_seeds_that_are_shown(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  setting(opened, temperature="0.7", topP="0.9", maxTokens="77")
  opened.ask("draw")
  form = server.last
  assert (form.temperature, form.top_p, form.max_tokens) == (0.7, 0.9, 77)
  assert form.seed is not None
  assert str(form.seed) in opened.page.locator(".facts").inner_text()
  opened.page.get_by_role("button", name="Regenerate").click()
  opened.done()
  assert server.last.seed != form.seed
  setting(opened, seed="7")
  opened.ask("draw again")
  assert server.last.seed == 7


def test_settings_stay_but_the_key_does_not(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  setting(opened, temperature="1.5", system="Be brief.", key="secret")
  opened.page.reload()
  opened.page.get_by_role("button", name="Settings").click()
  values = {name: opened.page.locator(f"#{name}").input_value() for name in ("system", "key")}
  assert values == {"system": "Be brief.", "key": ""}
  stored = opened.page.evaluate("JSON.stringify(localStorage)")
  assert "Be brief" in stored
  assert "secret" not in stored
  opened.page.get_by_role("button", name="Reset").click()
  assert opened.page.locator("#temperature").input_value() == "0"
  assert opened.page.locator("#system").input_value() == ""


def test_numbers_out_of_bounds_are_not_taken(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  page = opened.page
  setting(opened, maxTokens="0", seed="-3")
  assert page.locator("#settings").is_visible(), "the browser says what is wrong"
  page.keyboard.press("Escape")
  page.locator("#settings").wait_for(state="hidden")
  opened.ask("hello")
  assert (server.last.max_tokens, server.last.seed) == (None, None), "those are the defaults"


def test_the_key_is_asked_for(open_page: Opener, server: Server) -> None:
  server.key = "secret"
  opened = open_page(server)
  opened.ask("hello", wait=False)
  opened.page.locator("#settings[open]").wait_for()
  assert opened.page.evaluate("document.activeElement.id") == "key"
  assert "no key" in opened.page.locator(".problem").inner_text()
  opened.page.keyboard.type("secret")
  opened.page.keyboard.press("Enter")
  opened.page.get_by_role("button", name="Regenerate").click()
  opened.page.locator(".turn .text", has_text="disk").wait_for()
  assert len(server.asked) == 1


def test_a_refused_question_says_why_and_is_left_out(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  opened.ask("refuse")
  assert opened.page.locator(".problem").inner_text() == "the prompt is too long; ask less"
  opened.ask("hello")
  assert said(server.last) == [("user", ["hello"])]


@pytest.mark.parametrize(
  ("question", "problem"),
  [("fail", "the engine has failed"), ("break", "The connection broke before the answer was complete.")],
)  # fmt: skip
def test_a_stream_that_fails_keeps_what_was_said(
  open_page: Opener, server: Server, question: str, problem: str
) -> None:
  opened = open_page(server)
  opened.ask(question)
  assert opened.page.locator(".problem").inner_text() == problem
  assert opened.answer == TOKENS[0][0] + TOKENS[1][0]
  assert opened.page.get_by_role("button", name="Regenerate").is_visible()


def test_a_server_that_is_gone_is_said(open_page: Opener) -> None:
  with serving(page_config()) as server:
    opened = open_page(server)
    opened.page.get_by_text("tiny · cropping").wait_for()
  opened.ask("hello")
  assert opened.page.locator(".problem").inner_text() == (
    "The server cannot be reached. Is it still running?"
  )


def test_the_page_waits_until_the_server_is_warm(open_page: Opener) -> None:
  with serving(page_config(), cold=2) as server:
    opened = open_page(server)
    opened.page.locator("#notice", has_text="warming up").wait_for()
    opened.page.locator("#question").fill("hello")
    assert opened.page.locator("#send").is_disabled()
    opened.page.get_by_text("tiny · cropping").wait_for()
    assert opened.page.locator("#notice").is_hidden()
    assert opened.page.locator("#send").is_enabled()


def test_text_never_becomes_markup(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  hostile = "<img src=x onerror=alert(1)><script>alert(2)</script> &amp; 😀"
  opened.ask(f"say {hostile}")
  assert opened.answer == hostile
  assert opened.page.locator(".turn .question").inner_text() == f"say {hostile}"
  assert opened.page.locator(".turn img, .turn script").count() == 0


def test_the_margins_of_the_tokens_are_shown(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  page = opened.page
  opened.ask("How sure?")
  facts = page.locator(".facts").inner_text()
  assert f"Smallest margin\n{SMALLEST}" in facts
  assert f"Tokens\n600 read, {len(TOKENS)} written" in facts
  assert page.locator(".bars i").count() == len(TOKENS)
  line = page.locator(".token")
  assert line.inner_text() == "“ teal” 40.0%, next “ blue” 35.0%, margin 0.13"
  page.locator(".text span", has_text="disk").hover()
  assert line.inner_text() == "“ disk” 70.0%, next “ circle” 20.0%, margin 1.25"
  slider = page.get_by_role("slider", name="Margins of the tokens")
  slider.focus()
  page.keyboard.press("Home")
  assert slider.get_attribute("aria-valuetext") == "“There” 90.0%, next “It” 5.0%, margin 2.89"
  page.keyboard.press("ArrowRight")
  assert slider.get_attribute("aria-valuenow") == "2"
  assert page.locator(".text .lit").inner_text() == " is"
  page.keyboard.press("End")
  assert slider.get_attribute("aria-valuenow") == str(len(TOKENS))
  assert "".join(page.locator(".text span").all_inner_texts()) == TEXT


def test_the_times_of_an_answer_are_shown(open_page: Opener, server: Server) -> None:
  opened = open_page(server)
  opened.ask("How fast?")
  facts = dict(row.split("\n") for row in opened.page.locator(".facts div").all_inner_texts())
  assert 0.005 < float(facts["First token"].removesuffix(" s")) < 2
  assert 2 < float(facts["Speed"].removesuffix(" tokens/s")) < 50
