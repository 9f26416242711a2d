"""Messages become a conversation, and that a request, as training would have written its prompt."""

from __future__ import annotations

from typing import Any

import pytest

from llava_sp_jax.data import conversation as templates
from llava_sp_jax.infer.requests import Request
from llava_sp_jax.serve import conversation
from llava_sp_jax.serve.conversation import Conversation
from llava_sp_jax.serve.errors import ApiError
from tests.serve.requests import body, chat, said, text, user


def picture(url: str) -> dict[str, Any]:
  return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def talk(*messages: dict[str, Any]) -> Conversation:
  return conversation.of(chat(body(messages=list(messages))).messages)


A, B = picture("a"), picture("b")
QUESTIONS = {
  # name: (parts of the user, the question)
  "a text": (("Hi?",), "Hi?"),
  "a part": ((text("Hi?"),), "Hi?"),
  "parts": ((text("a"), text(" b ")), "a\n b "),
  "a picture first": ((A, text("What?")), "What?"),
  "a picture last": ((text("What?"), A), "What?\n<image>"),
  "a picture alone": ((A,), ""),
  "two pictures first": ((A, B, text("Same?")), "Same?"),
  "pictures between texts": (
    (text("One"), A, text("Two"), B, text("?")), "One\n<image>\nTwo\n<image>\n?"),
  "nothing": (("",), ""),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "question"), QUESTIONS.values(), ids=QUESTIONS.keys())
def test_questions(parts: tuple[Any, ...], question: str) -> None:
  found = talk(user(*parts))
  images = tuple(url.encode() for url, _ in found.links)
  assert [i.decode() for i in images] == [p["image_url"]["url"] for p in parts if p in (A, B)]
  assert found.request(images) == Request(question, images)


@pytest.mark.parametrize("parts", [(A, text("What?")), (text("What?"), A)])
def test_one_picture_stands_where_training_has_it(parts: tuple[Any, ...]) -> None:
  template = templates.TEMPLATES["v1"]
  question = talk(user(*parts)).request([b"a"]).question
  assert templates.prompt(question, template, 1) == templates.prompt("What?", template, 1)


def test_links_name_their_fields() -> None:
  found = talk(user("Hi"), said("assistant", "Yes"), user(text("x"), A, B))
  assert found.links == (
    ("a", "messages[2].content[1].image_url.url"),
    ("b", "messages[2].content[2].image_url.url"),
  )


def test_system_texts_come_first_and_are_joined() -> None:
  found = talk(said("system", "Be brief."), said("developer", "Be kind."), user("Hi"))
  assert found.request([]) == Request("Hi", (), "Be brief.\nBe kind.")
  assert talk(said("system", ""), user("Hi")).system == ""  # not the template's own
  assert talk(user("Hi")).system is None


def test_several_turns() -> None:
  found = talk(user("a"), said("assistant", "b"), said("assistant", "c"), user("d"), user(A))
  assert [(turn.role, turn.text) for turn in found.turns] == [
    ("user", "a"),
    ("assistant", "b\nc"),
    ("user", "d\n<image>"),
  ]
  assert found.request([b"a"]) == Request("d\n<image>", (b"a",), history=(("a", "b\nc"),))


def test_pictures_of_several_turns_have_their_marks() -> None:
  """Without them, all pictures would stand in the first turn."""
  found = talk(
    said("system", "s"), user(A, text("a")), said("assistant", "b"), user("c"),
    said("assistant", "d"), user(B, text("e")),
  )  # fmt: skip
  history = (("<image>\na", "b"), ("c", "d"))
  assert found.request([b"a", b"b"]) == Request("<image>\ne", (b"a", b"b"), "s", history=history)


def test_a_prompt_is_one_question() -> None:
  assert conversation.of_prompt("Hi?").request([]) == Request("Hi?")
  with pytest.raises(ApiError, match="leave it out") as caught:
    conversation.of_prompt("an <image>")
  assert caught.value.param == "prompt"


REFUSED: dict[str, tuple[list[dict[str, Any]], str, str]] = {
  "no question": ([said("system", "x")], "messages[0].role", "add the question"),
  "an answer last": ([user("a"), said("assistant", "b")], "messages[1].role", "add the question"),
  "an answer first": ([said("assistant", "b"), user("a")], "messages[0].role", "no question"),
  "a late system": ([user("a"), said("system", "b")], "messages[1].role", "send it first"),
  "a mark": ([user("see <image>")], "messages[0].content", "leave it out"),
  "a mark in a part": ([user(A, text("<image>"))], "messages[0].content", "'<image>'"),
  "a mark of the system": (
    [said("system", "<image>"), user("a")],
    "messages[0].content",
    "picture",
  ),
}


@pytest.mark.parametrize(("messages", "param", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_conversations_that_are_refused(
  messages: list[dict[str, Any]], param: str, says: str
) -> None:
  with pytest.raises(ApiError) as caught:
    talk(*messages)
  error = caught.value
  assert (error.status, error.param) == (400, param)
  assert says in str(error)
