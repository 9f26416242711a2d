"""Several turns: read as in training, answered as one prompt, and their prefix is reused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llava_sp_jax import config as config_lib
from llava_sp_jax.data import conversation, reading
from llava_sp_jax.data.conversation import TEMPLATES
from llava_sp_jax.infer.engine import Engine, EngineLayout, Generation, Request
from llava_sp_jax.infer.likelihood import Likelihood
from llava_sp_jax.infer.pretrained import Pretrained
from tests.infer.tiny import Oracle

NEW = 6
TURNS = (("<image>\nwhat is it?", "a circle"), ("is it red?", "no, blue"), ("sure?", "yes"))


@pytest.fixture(scope="module")
def engine(model: Pretrained) -> Engine:
  return Engine(model, 2, Generation(max_new_tokens=NEW))


def turn(images: Path, count: int) -> Request:
  """The question of a turn, after those before it."""
  question, _ = TURNS[count]
  return Request(question, (images / "0.png",), history=TURNS[:count])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_later_question_has_the_ids_of_training(name: str, model: Pretrained) -> None:
  """Those before its reply, whatever the template; `###` trains another text, as the original."""
  template, tokenizer = TEMPLATES[name], model.tokenizer
  if template.training is not None:
    pytest.skip("trains another text than it prompts with")
  trained = reading.dialogue(list(TURNS), template, "chain", tokenizer)
  *history, (question, _) = TURNS
  asked = reading.question(question, 1, template, tokenizer, history=history)
  ids = [i for run in asked for i in run.ids]
  assert ids == [i for run in trained for i in run.ids][: len(ids)]
  supervised = [run for run in trained if all(run.supervised)]
  assert [run for run in asked if all(run.supervised)] == supervised[:2]


def test_marks_stand_before_the_first_question_if_there_are_none() -> None:
  template = TEMPLATES["v1"]
  history = (("what?", "a cat"),)
  pieces = conversation.prompt("why?", template, 1, history)
  assert "".join(p.text for p in pieces) == (
    f"{template.system}USER: <image>\nwhat? ASSISTANT: a cat</s>USER: why? ASSISTANT:"
  )


def test_a_conversation_is_answered_as_the_whole_prompt(
  engine: Engine, model: Pretrained, tiny_data: Path
) -> None:
  oracle = Oracle(model)
  requests = [turn(tiny_data / "images", count) for count in range(3)]
  wanted = [oracle.greedy(request, NEW) for request in requests]
  assert [answer.ids for answer in engine.answer(requests)] == wanted
  assert len(set(wanted)) == 3
  alone = Engine(model, 1, Generation(max_new_tokens=NEW), layout=EngineLayout(share=False))
  assert [answer.ids for answer in alone.answer(requests)] == wanted


def test_a_turn_reads_only_what_is_new(engine: Engine, tiny_data: Path) -> None:
  engine.forget()
  images, counts = tiny_data / "images", engine.counts
  read = []
  for count in range(3):
    before = dataclasses.replace(counts)
    list(engine.answer([turn(images, count)]))
    read.append((counts.prefills - before.prefills, counts.prefix_hits - before.prefix_hits))
    assert counts.encoder_calls - before.encoder_calls == (count == 0)
  pieces = engine.prompt(turn(images, 2)).pieces
  assert read[1][0] == read[2][0] == 1  # the turn that was answered last
  assert pieces[-1].start > 0
  first, last = (engine.prompt(turn(images, n)).pieces for n in (1, 2))
  assert [p.key for p in first[:-1]] == [p.key for p in last[: len(first) - 1]]


def test_a_picture_of_a_later_turn_leaves_the_pieces_before_it(
  model: Pretrained, tiny_data: Path
) -> None:
  """Also with tiles and the newline token, whose slot depends on the number of tiles."""
  side = model.config.model.tower.image_size
  data = dataclasses.replace(
    model.config.data, image_aspect="anyres", grid_pinpoints=((side, 2 * side), (2 * side, side))
  )
  config = dataclasses.replace(model.config, data=data)
  images = tiny_data / "images"
  one = Request("<image> what?", (images / "0.png",), history=())
  two = Request(
    "and <image>?", (images / "0.png", images / "1.png"), history=(("<image> what?", "x"),)
  )
  for c in (model.config, config):
    engine = Engine(dataclasses.replace(model, config=c), 2, Generation(max_new_tokens=2))
    before, after = engine.prompt(one).pieces, engine.prompt(two).pieces
    assert [p.key for p in after[: len(before) - 1]] == [p.key for p in before[:-1]]
    assert [len(p.tiles) > 0 for p in after] == [False, True, False, True]
    tokens = {int(p.slots.max()) for p in after if p.tiles}
    assert len(tokens) == 1  # each piece counts its own tiles


def test_only_the_continuation_is_scored(model: Pretrained, tiny_data: Path) -> None:
  """The answers of earlier turns are context."""
  likelihood = Likelihood(model, 2)
  asked = turn(tiny_data / "images", 2)
  first, second, both = likelihood([(asked, "yes"), (asked, "no"), (asked, "yes")])
  assert first == both != second
  oracle = Oracle(model)
  assert isinstance(model.config, config_lib.Config)
  ids = reading.question(
    asked.question,
    1,
    TEMPLATES[model.config.data.template],
    model.tokenizer,
    reply="yes",
    history=asked.history,
  )[-1].ids
  total = 0.0
  for at, token in enumerate(ids):
    logits = oracle.logits(asked, ids[:at]).astype("float64")
    total += float(logits[token] - logits.max() - _spread(logits))
  assert first[0] == pytest.approx(total, abs=1e-3)


def _spread(logits: object) -> float:
  import numpy as np

  values = np.asarray(logits)
  return float(np.log(np.exp(values - values.max()).sum()))
