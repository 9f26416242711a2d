"""Prompts, ids and labels against the original's, entry by entry; every difference is listed.

`text.json` has the golden file's entries with each conversation once, and labels as the spans
[start, end) of ids that are learned.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from typing import Any

import pytest

from llava_sp_jax.data import conversation, example, forms, reading
from llava_sp_jax.data.conversation import TEMPLATES, TextPiece
from llava_sp_jax.data.tokenizer import Tokenizer
from tests.data.golden_tokenizers import GOLDEN, SETTINGS

TEXT = json.loads((GOLDEN / "text.json").read_text())
LIMIT = TEXT["model_max_length"]
ENTRIES = TEXT["preprocess"]
CHATML = ("mpt", "chatml_direct")
SHORT = (
  "one_turn_image",
  "image_after",
  "image_middle",
  "two_turns_image",
  "image_second_turn",
  "three_turns_text",
  "one_turn_text",
  "unicode",
  "starts_with_gpt",
  "newlines",
  "answer_contains_role",
  "spaces",
  "answer_with_eos",
  "plain_caption",
  "plain_caption2",
)

# Samples that the original drops with "tokenization mismatch" and that are learned here.
DROPPED = {
  "v1": ("answer_contains_role", "answer_with_eos"),
  "v1_mmtag": ("answer_contains_role", "answer_with_eos"),
  "llava_llama_2": ("answer_with_eos",),
  "mistral_instruct": (
    "two_turns_image",
    "image_second_turn",
    "three_turns_text",
    "answer_with_eos",
  ),
  **dict.fromkeys(CHATML, SHORT),
}

# Labels that slip in the original: v0 counts tokens of every turn that are in none; mpt and chatml
# begin one token early and leave out the last end mark.
SLIPPED = {
  **dict.fromkeys(
    CHATML, ("empty_answer", "empty_answer_text", "long_answer_image", "long_answer_text")
  ),
  **dict.fromkeys(
    ("llava_v0", "v0_mmtag"),
    tuple(n for n in TEXT["conversations"] if n not in ("two_images_one_turn", "starts_with_gpt")),
  ),
}

# The original keeps one image of a turn and drops the others.
SEVERAL_IMAGES = dict.fromkeys({e["version"] for e in ENTRIES}, ("two_images_one_turn",))

# The original leaves a greeting in front of the first question out, but not in its v0 templates.
GREETING = {"llava_v0": ("starts_with_gpt",), "v0_mmtag": ("starts_with_gpt",)}

# The original's plain training wants one question with an image and one reply, and raises.
RAISES = {
  "plain": (
    "two_turns_image",
    "image_second_turn",
    "three_turns_text",
    "one_turn_text",
    "empty_answer_text",
    "human_only",
    "human_only_image",
    "starts_with_gpt",
    "long_answer_text",
    "long_first_turn_text",
    "spaces",
    "answer_with_eos",
  )
}


def ids_and_labels(runs: list[example.Run]) -> tuple[list[int], list[int]]:
  ids = [i for run in runs for i in run.ids]
  supervised = [flag for run in runs for flag in run.supervised]
  return ids, [i if flag else -100 for i, flag in zip(ids, supervised, strict=True)]


@pytest.mark.parametrize(
  ("key", "name"), [("ids", "legacy_false"), ("ids_legacy_true", "legacy_true")]
)
def test_text_around_images(tokenizers: dict[str, Tokenizer], key: str, name: str) -> None:
  for entry in TEXT["tokenizer_image_token"]:
    runs = reading.tokenize([TextPiece(entry["prompt"], False, 0)], tokenizers[name])
    assert ids_and_labels(runs)[0] == entry[key], entry["prompt"]


@pytest.mark.parametrize(
  ("key", "name"), [("ids", "legacy_false"), ("ids_legacy_true", "legacy_true")]
)
def test_plain_text_and_back(tokenizers: dict[str, Tokenizer], key: str, name: str) -> None:
  tokenizer = tokenizers[name]
  for entry in TEXT["plain_tokenize"]:
    text = entry["text"]
    assert [tokenizer.bos_id, *tokenizer.encode(text)] == entry[key], text
    assert tokenizer.decode(entry["ids"]) == entry["decoded"]
    places = [last for _, last in tokenizer.spans(text)]
    assert places == sorted(places)
    assert all(0 <= last < len(text) for last in places)


@pytest.mark.parametrize("golden", TEXT["templates"]["prompts"], ids=lambda g: g["template"])
def test_prompts(golden: dict[str, Any]) -> None:
  """Word for word, but for `plain`: the original prompts it with a line break that it never learns,
  and raises for a reply; here a caption follows its image, as in training."""
  template = TEMPLATES[golden["template"]]
  question, answer, second, last = TEXT["templates"]["turns"]
  shown = f"<image>\n{question}"
  # Its web page sends a tagged image as a turn of its own; without tags, as any other.
  tagged = [(template.image, "Received."), (question, None)]
  dialogues: dict[str, conversation.Turns] = {
    "one_turn_open": [(shown, None)],
    "two_turns_open": [(shown, answer), (second, None)],
    "two_turns_closed": [(shown, answer), (second, last)],
    "empty_answer": [(question, ""), (second, None)],
    "tuple_image": tagged if "mmtag" in golden["version"] else [(shown, None)],
  }
  if golden["sep_style"] == "PLAIN":
    assert golden["two_turns_open"] == golden["two_turns_closed"] == "RAISES TypeError"
    assert golden["one_turn_open"] == golden["tuple_image"] == f"{shown}\n"
    assert [p.text for p in conversation.prompt(shown, template) if p.text] == ["<image>"]
    return
  for name, turns in dialogues.items():
    assert "".join(p.text for p in conversation.write(turns, template)) == golden[name], name


def test_every_template_of_the_original_has_a_row() -> None:
  names = {golden["template"] for golden in TEXT["templates"]["prompts"]}
  assert names == set(TEMPLATES) - {"smollm2"}


def template_of(entry: dict[str, Any]) -> conversation.Template:
  template = TEMPLATES[entry["version"]]
  image = "<im_start><image><im_end>" if entry["im_start_end"] else template.image
  return dataclasses.replace(template, image=image)


def ours(entry: dict[str, Any], turns: Any, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
  """Ids and labels of a conversation, cut as the original cuts those without an image."""
  pieces = conversation.chain(forms.read({"conversations": turns}).turns, template_of(entry))
  ids, labels = ids_and_labels(reading.tokenize(pieces, tokenizer))
  has_image = TEXT["conversations"][entry["name"]][0]
  return (ids, labels) if has_image else (ids[:LIMIT], labels[:LIMIT])


def theirs(entry: dict[str, Any]) -> tuple[list[int], list[int]]:
  labels = [-100] * len(entry["ids"])
  for start, end in entry["learned"]:
    labels[start:end] = entry["ids"][start:end]
  return entry["ids"], labels


def kind_of_difference(entry: dict[str, Any], tokenizer: Tokenizer) -> str:
  ids, labels = ours(entry, TEXT["conversations"][entry["name"]][1], tokenizer)
  if entry["raises"]:
    return "raises"
  if (ids, labels) == theirs(entry):
    return "none"
  if ids == entry["ids"]:
    return "dropped" if entry["mismatch"] else "slipped"
  return "several images" if ids.count(-200) > entry["ids"].count(-200) else "other text"


def test_ids_and_labels_of_every_entry(tokenizers: dict[str, Tokenizer]) -> None:
  found: dict[str, set] = defaultdict(set)
  for i, entry in enumerate(ENTRIES):
    found[kind_of_difference(entry, tokenizers[entry["tokenizer"]])].add(i)
  listed = {
    "dropped": DROPPED,
    "slipped": SLIPPED,
    "several images": SEVERAL_IMAGES,
    "other text": GREETING,
    "raises": RAISES,
  }
  for kind, names in listed.items():
    wanted = {i for i, e in enumerate(ENTRIES) if e["name"] in names.get(e["version"], ())}
    assert found[kind] == wanted, kind
  assert {kind: len(entries) for kind, entries in found.items()} == {
    "none": 126,
    "dropped": 86,
    "slipped": 62,
    "several images": 14,
    "other text": 2,
    "raises": 12,
  }


def test_one_image_in_place_of_several_gives_the_original_s_text(
  tokenizers: dict[str, Tokenizer],
) -> None:
  for entry in ENTRIES:
    if entry["name"] != "two_images_one_turn" or entry["raises"]:
      continue
    question, reply = TEXT["conversations"][entry["name"]][1]
    turns = [{"from": "human", "value": question["value"].replace("<image>\n", "", 1)}, reply]
    assert ours(entry, turns, tokenizers[entry["tokenizer"]])[0] == entry["ids"]


def squeezed(text: str) -> str:
  return re.sub(r"\s|<s>|</s>|<\|im_end\|>", "", text)


@pytest.mark.parametrize("version", sorted({e["version"] for e in ENTRIES}))
def test_exactly_the_replies_are_learned(tokenizers: dict[str, Tokenizer], version: str) -> None:
  """Also where the original is no measure: what carries a label is replies and their end marks."""
  for entry in (e for e in ENTRIES if e["version"] == version):
    tokenizer = tokenizers[entry["tokenizer"]]
    template = TEMPLATES[version].training or TEMPLATES[version]
    turns = forms.read({"conversations": TEXT["conversations"][entry["name"]][1]}).turns
    pieces = conversation.chain(turns, template_of(entry))
    ids, labels = ids_and_labels(reading.tokenize(pieces, tokenizer))
    replies = [r for _, r in turns if r is not None and (r or template.empty_reply)]
    wanted = "".join(f"{template.answer}{reply}{template.end}" for reply in replies)
    learned = [i for i in labels if i != -100]
    assert squeezed(tokenizer.decode(learned)) == squeezed(wanted), entry["name"]
    stops = tokenizer.stop_ids(template.end)
    assert sum(i in stops for i in learned) >= len(replies)
    assert len(ids) == len(labels)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("version", sorted(TEMPLATES))
def test_a_branch_has_the_ids_of_a_sample_of_its_own(
  tokenizers: dict[str, Tokenizer], version: str, name: str
) -> None:
  turns: conversation.Turns = [("<image>\nwhat?", "red"), ("is it blue?", " no, red ")]
  runs = reading.tokenize(conversation.branch(turns, TEMPLATES[version]), tokenizers[name])
  for i, (question, reply) in enumerate(turns):
    alone = [("<image>" + question.replace("<image>", ""), reply)]
    sample = reading.tokenize(conversation.chain(alone, TEMPLATES[version]), tokenizers[name])
    shared = [run for run in runs if run.branch in (0, i + 1)]
    assert ids_and_labels(shared) == ids_and_labels(sample)


STOPS = {
  ("v1", "legacy_false"): (2,),
  ("v1", "legacy_true"): (2,),
  ("llava_llama_2", "legacy_false"): (2,),
  ("mpt", "no_bos_chatml"): (2, 513),
  ("plain", "legacy_false"): (2, 13),
}


@pytest.mark.parametrize(("version", "name"), STOPS)
def test_stop_tokens(tokenizers: dict[str, Tokenizer], version: str, name: str) -> None:
  """The first special token of the end mark, not the blank that may stand before it."""
  assert tokenizers[name].stop_ids(TEMPLATES[version].end) == STOPS[version, name]


def test_rows_are_padded_as_the_original_pads(tokenizers: dict[str, Tokenizer]) -> None:
  golden = TEXT["collator"]
  length = max(golden["lengths"])
  kind = {"version": "v1", "tokenizer": "legacy_false", "im_start_end": False}
  by_name = {e["name"]: e for e in ENTRIES if e.items() >= kind.items()}
  for name, count, wanted in zip(
    golden["names"], golden["lengths"], golden["input_ids"], strict=True
  ):
    runs = example.from_labels(*theirs(by_name[name]))
    images = [example.one_tile(1)] * wanted.count(-200)
    row = example.layout(runs, images, length)
    assert row.length == count
    assert row.tokens.tolist() == [max(i, 0) for i in wanted]
    assert not row.segments[count:].any()
