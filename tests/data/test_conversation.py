"""Text and labels of each template, turn by turn, written out by hand."""

from __future__ import annotations

import pytest

from llava_sp_jax.data import conversation, example, forms, reading
from llava_sp_jax.data.conversation import TEMPLATES
from llava_sp_jax.data.failure import SampleError
from llava_sp_jax.data.tokenizer import Tokenizer
from tests.conftest import ConfigMaker

TURNS = [("<image>\nwhat is it?", "red"), ("is it blue?", "no"), ("sure?", "yes")]
SYSTEM = (
  "A chat between a curious user and an artificial intelligence assistant. "
  "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


@pytest.fixture(scope="module")
def tokenizer(tiny_config: ConfigMaker) -> Tokenizer:
  return Tokenizer(tiny_config().data.tokenizer)


def text_of(pieces: list[conversation.TextPiece]) -> str:
  return "".join(p.text for p in pieces)


@pytest.mark.parametrize("text", [" what? ", "what?\n", "\nwhat?", "what?", ""])
def test_an_open_question_keeps_its_blanks(text: str) -> None:
  """model_vqa.py of LLaVA: `<image>`, a newline and the file's text; training strips the text."""
  for name, written in (("v1", "<image>\n"), ("v1_mmtag", "<Image><image></Image>\n")):
    template = TEMPLATES[name]
    asked = text_of(conversation.prompt("<image>\n" + text, template))
    assert asked == template.system + "USER: " + written + text + " ASSISTANT:"
    trained = text_of(conversation.chain([("<image>\n" + text, "x")], template))
    assert f"USER: {(written + text.strip()).strip()} ASSISTANT: x" in trained


@pytest.mark.parametrize(
  "text",
  [
    "first: <image> second: <image> which is taller?",
    "<image>\n<image>\nwhich is taller?",
    "<image> <image>\n which? ",
    "which is taller,\n<image> or <image>",
  ],
)
def test_several_images_stay_where_the_text_puts_them(text: str) -> None:
  """As in LLaVA-NeXT, in training and in a prompt; the original keeps one of them."""
  for name, written in (("v1", "<image>"), ("v1_mmtag", "<Image><image></Image>")):
    template = TEMPLATES[name]
    wanted = f"{template.system}USER: {text.replace('<image>', written)} ASSISTANT:"
    assert text_of(conversation.prompt(text, template)) == wanted
    assert text_of(conversation.chain([(text, "x")], template)) == f"{wanted} x</s>"


def test_each_turn_places_its_images() -> None:
  turns = [("a <image> b <image>", "x"), ("and <image> here?", "y")]
  text = text_of(conversation.chain(turns, TEMPLATES["v1"]))
  assert "USER: a <image> b <image> ASSISTANT: x</s>" in text
  assert "USER: <image>\nand  here? ASSISTANT: y</s>" in text


def learned(pieces: list[conversation.TextPiece]) -> list[str]:
  return [p.text for p in pieces if p.supervised]


def test_chain_of_v1() -> None:
  pieces = conversation.chain(TURNS, TEMPLATES["v1"])
  assert text_of(pieces) == (
    f"{SYSTEM}USER: <image>\nwhat is it? ASSISTANT: red</s>"
    "USER: is it blue? ASSISTANT: no</s>USER: sure? ASSISTANT: yes</s>"
  )
  assert learned(pieces) == [" red</s>", " no</s>", " yes</s>"]
  assert {p.branch for p in pieces} == {0}


def test_branches_of_v1_share_only_system_and_image() -> None:
  pieces = conversation.branch(TURNS, TEMPLATES["v1"])
  trunk = text_of([p for p in pieces if p.branch == 0])
  assert trunk == f"{SYSTEM}USER: <image>"
  tails = [text_of([p for p in pieces if p.branch == i]) for i in (1, 2, 3)]
  assert tails == [
    "\nwhat is it? ASSISTANT: red</s>",
    "\nis it blue? ASSISTANT: no</s>",
    "\nsure? ASSISTANT: yes</s>",
  ]
  for (question, reply), tail in zip(TURNS, tails, strict=True):
    alone = f"<image>\n{question.replace('<image>', '').strip()}"
    assert trunk + tail == text_of(conversation.chain([(alone, reply)], TEMPLATES["v1"]))


@pytest.mark.parametrize("name", TEMPLATES)
def test_branches_of_every_template_read_as_samples_of_their_own(name: str) -> None:
  pieces = conversation.branch(TURNS, TEMPLATES[name])
  trunk = text_of([p for p in pieces if p.branch == 0])
  assert trunk.endswith("<image>")
  for i, (question, reply) in enumerate(TURNS):
    alone = "<image>" + question.replace("<image>", "")
    chained = conversation.chain([(alone, reply)], TEMPLATES[name])
    assert trunk + text_of([p for p in pieces if p.branch == i + 1]) == text_of(chained)
    assert learned([p for p in pieces if p.branch == i + 1]) == learned(chained)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompt_is_what_a_reply_follows(name: str) -> None:
  """Prompt and training differ only where a template says so."""
  template = TEMPLATES[name]
  asked = text_of(conversation.prompt("<image>\nwhat?", template))
  written = text_of(conversation.chain([("<image>\nwhat?", "red")], template))
  if template.training:
    assert "\n### Human: " in written
    assert "###Human: " in asked
  else:
    assert written == f"{asked}{template.answer}red{template.end}"


def test_a_question_without_reply_teaches_nothing() -> None:
  asked = [*TURNS, ("and now?", None)]
  pieces = conversation.chain(asked, TEMPLATES["v1"])
  assert text_of(pieces).endswith("ASSISTANT: yes</s>USER: and now? ")
  assert len(learned(pieces)) == 3
  assert text_of(conversation.chain([("x", None)], TEMPLATES["mpt"])).endswith("user\nx<|im_end|>")


def test_an_empty_reply_teaches_nothing_but_where_the_original_writes_it() -> None:
  assert not learned(conversation.chain([("<image>\nx", "")], TEMPLATES["v1"]))
  assert learned(conversation.chain([("<image>\nx", "")], TEMPLATES["plain"])) == ["\n"]
  assert learned(conversation.chain([("x", "")], TEMPLATES["llava_v0"])) == [" \n### "]


def test_a_greeting_is_left_out() -> None:
  turns = [("gpt", "welcome"), ("human", "hi"), ("gpt", "hello")]
  messages = [{"from": who, "value": text} for who, text in turns]
  assert forms.read({"conversations": messages}).turns == [("hi", "hello")]
  with pytest.raises(SampleError, match="turn 1: expected a text from 'human'"):
    forms.read({"conversations": [messages[0], messages[0]]})


def test_tags_around_an_image() -> None:
  for name in ("v0_mmtag", "v1_mmtag"):
    pieces = conversation.prompt("what <image>", TEMPLATES[name])
    assert "<Image><image></Image>\nwhat" in text_of(pieces)


def test_plain_keeps_only_image_and_caption() -> None:
  pieces = conversation.chain([("describe <image> briefly", "a red circle")], TEMPLATES["plain"])
  assert text_of(pieces) == "<image>a red circle\n"
  assert learned(pieces) == ["a red circle\n"]


def test_an_image_in_the_middle_goes_to_the_front() -> None:
  assert conversation.image_first("look <image> here") == "<image>\nlook  here"
  assert conversation.image_first("a<image>b<image>") == "a<image>b<image>"
  assert conversation.image_first("no picture ") == "no picture "
  assert conversation.image_first(" <image>\n") == "<image>"


def test_a_prompt_ends_where_the_answer_begins() -> None:
  pieces = conversation.prompt("<image>\nwhat?", TEMPLATES["v1"])
  assert text_of(pieces).endswith("USER: <image>\nwhat? ASSISTANT:")
  assert not learned(pieces)


@pytest.mark.parametrize(
  ("first", "second"), [("no image", "x"), ("<image> <image>", "x"), ("<image>", "<image> again")]
)
def test_branches_need_one_image_in_the_first_turn(first: str, second: str) -> None:
  with pytest.raises(SampleError, match="exactly one <image>, in the first turn"):
    conversation.branch([(first, "a"), (second, "b")], TEMPLATES["v1"])


@pytest.mark.parametrize(
  ("messages", "message"),
  [
    (None, "`conversations` must be a list"),
    ([], "`conversations` must be a list"),
    ([{"from": "gpt", "value": "x"}], "turn 0: expected a text from 'human'"),
    ([{"from": "human", "value": "x"}] * 2, "turn 1: expected a text from 'gpt'"),
    ([{"from": "human", "value": 3}], "turn 0: expected a text or a list of parts, found 3"),
    (["x"], "turn 0: expected a text from one of human, user, .*, found 'x'"),
  ],
)
def test_turns_that_do_not_alternate(messages: object, message: str) -> None:
  with pytest.raises(SampleError, match=message):
    forms.read({"conversations": messages})


def test_labels_fall_on_answers_only(tokenizer: Tokenizer) -> None:
  """What carries weight, decoded, is exactly the replies with their end marks."""
  runs = reading.tokenize(conversation.chain(TURNS, TEMPLATES["v1"]), tokenizer)
  row = example.layout(runs, [example.one_tile(5)], 256)
  groups: list[list[int]] = []
  for i in range(256):
    if not row.weights[i]:
      continue
    if not i or not row.weights[i - 1]:
      groups.append([])
    groups[-1].append(int(row.targets[i]))
  stop = tokenizer.encode("</s>")[0]
  assert [g[-1] for g in groups] == [stop] * 3
  assert [tokenizer.decode(g) for g in groups] == [" red", " no", " yes"]


def test_targets_are_the_next_tokens(tokenizer: Tokenizer) -> None:
  runs = reading.tokenize(conversation.chain(TURNS, TEMPLATES["v1"]), tokenizer)
  row = example.layout(runs, [example.one_tile(5)], 256)
  end = row.length
  assert row.targets[: end - 1].tolist() == row.tokens[1:end].tolist()
  assert row.tokens[0] == tokenizer.bos_id
  assert not row.weights[end - 1 :].any()
