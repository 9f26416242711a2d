"""Settings are values of a request: any of them share a batch and its programs."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import jax
import numpy as np
import pytest

from llava_sp_jax.infer import broadcast
from llava_sp_jax.infer.engine import Answer, Engine, EngineLayout, Generation, Request
from llava_sp_jax.infer.pretrained import Pretrained
from tests.infer.tiny import Oracle

NEW = 6
LAYOUT = EngineLayout(suffix=64, new_tokens=NEW, log_probabilities=5)


@pytest.fixture(scope="module")
def engine(model: Pretrained, asked: list[Request]) -> Engine:
  engine = Engine(model, 4, Generation(max_new_tokens=NEW), layout=LAYOUT)
  engine.warm_up(asked[:5])
  return engine


def one(engine: Engine, request: Request, **settings: Any) -> Answer:
  generation = Generation(**{"max_new_tokens": NEW, **settings})
  (answer,) = engine.answer([dataclasses.replace(request, generation=generation)])
  assert not answer.error
  return answer


def any_settings(random: random.Random, vocabulary: int) -> Generation:
  """Settings of all kinds, half of them left at their defaults."""

  def maybe(value: Any, default: Any) -> Any:
    return value if random.random() < 0.5 else default

  new = random.randint(1, NEW)
  return Generation(
    max_new_tokens=new,
    temperature=maybe(random.uniform(0.1, 2), 0.0),
    top_k=maybe(random.randint(1, 50), 0),
    top_p=maybe(random.uniform(0.1, 1), 1.0),
    min_p=maybe(random.uniform(0, 0.3), 0.0),
    seed=maybe(random.randint(-(1 << 63), (1 << 63) - 1), 0),
    min_new_tokens=maybe(random.randint(0, new), 0),
    presence_penalty=maybe(random.uniform(-2, 2), 0.0),
    frequency_penalty=maybe(random.uniform(-2, 2), 0.0),
    repetition_penalty=maybe(random.uniform(0.5, 2), 1.0),
    logit_bias=maybe(((random.randrange(vocabulary), random.uniform(-9, 9)),), ()),
    stop_ids=maybe(tuple(random.randrange(vocabulary) for _ in range(3)), ()),
    stop=maybe(("e",), ()),
    ignore_eos=maybe(True, False),
    log_probabilities=maybe(random.randint(0, 5), None),
  )


def test_two_hundred_settings_compile_nothing_and_do_not_meet(
  engine: Engine, asked: list[Request]
) -> None:
  """Each answer is that of its request alone, whatever shares the batch."""
  draw, vocabulary = random.Random(0), engine._rule.logits
  requests = [
    dataclasses.replace(asked[i % 5], generation=any_settings(draw, vocabulary), number=i % 3)
    for i in range(200)
  ]
  compiled = []
  before = engine.counts.compiles
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
  )
  together = list(engine.answer(requests))
  assert (engine.counts.compiles, compiled) == (before, [])
  assert not [answer.error for answer in together if answer.error]
  assert len({answer.ids for answer in together}) > 100
  for answer, request in zip(together, requests, strict=True):
    assert request.generation is not None
    assert len(answer.ids) <= request.generation.max_new_tokens
  for i in range(0, 200, 9):
    (alone,) = engine.answer([requests[i]])
    assert (alone.text, alone.ids, alone.reason) == (
      together[i].text,
      together[i].ids,
      together[i].reason,
    )


def test_ends_of_answers_and_their_reasons(engine: Engine, asked: list[Request]) -> None:
  free = [one(engine, request) for request in asked[:5]]
  ended = next(i for i, answer in enumerate(free) if len(answer.ids) < NEW)
  whole = next(i for i, answer in enumerate(free) if len(answer.ids) == NEW)
  assert (free[ended].reason, free[whole].reason) == ("stop", "length")
  assert free[ended].tokens == len(free[ended].ids) + 1
  assert free[whole].tokens == NEW
  length = engine.prompt(asked[whole]).length
  assert free[whole].prompt_tokens == length > 16  # image tokens are among them
  longer = one(engine, asked[ended], ignore_eos=True)
  assert len(longer.ids) == NEW
  assert longer.ids[: len(free[ended].ids)] == free[ended].ids
  forced = one(engine, asked[ended], min_new_tokens=NEW)
  assert len(forced.ids) == NEW
  assert not set(engine._rule.stop_ids) & set(forced.ids)
  third = free[whole].ids[2]
  stopped = one(engine, asked[whole], stop_ids=(third,))
  assert stopped.ids == free[whole].ids[: free[whole].ids.index(third)]
  assert (stopped.reason, stopped.tokens) == ("stop", len(stopped.ids) + 1)
  cut = one(engine, asked[whole], max_new_tokens=2)
  assert (cut.ids, cut.reason) == (free[whole].ids[:2], "length")


def test_a_bias_and_a_penalty_change_what_is_chosen(engine: Engine, asked: list[Request]) -> None:
  free = one(engine, asked[0])
  banned = one(engine, asked[0], logit_bias=((free.ids[0], -100.0),))
  assert banned.ids[:1] != free.ids[:1]
  wanted = next(i for i in range(20, 400) if i not in free.ids)
  assert set(one(engine, asked[0], logit_bias=((wanted, 100.0),)).ids) == {wanted}
  once = one(
    engine, asked[0], logit_bias=((wanted, 100.0), (wanted + 1, 90.0)), frequency_penalty=20.0
  )
  assert once.ids[:3] == (wanted, wanted + 1, wanted)


def test_log_probabilities_are_those_of_the_uncached_model(
  engine: Engine, model: Pretrained, asked: list[Request]
) -> None:
  oracle, answer = Oracle(model), one(engine, asked[1], log_probabilities=3, temperature=1.0)
  assert answer.log_probabilities is not None
  assert len(answer.log_probabilities) == len(answer.ids) > 1
  for at, found in enumerate(answer.log_probabilities):
    wanted = np.asarray(jax.nn.log_softmax(oracle.logits(asked[1], answer.ids[:at])))
    assert found.id == answer.ids[at]
    assert found.value == pytest.approx(float(wanted[found.id]), abs=2e-4)
    assert [i for i, _, _ in found.top] == np.argsort(-wanted)[:3].tolist()
    assert found.text == model.tokenizer.decode([found.id])
  assert one(engine, asked[1]).log_probabilities is None


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"max_new_tokens": NEW + 1}, "max_new_tokens: 7; at most 6 here"),
    ({"log_probabilities": 6}, "log_probabilities: 6; at most 5 here"),
    ({"num_beams": 2}, "num_beams: 2; this engine answers all requests with 1"),
    ({"stop_ids": (1 << 20,)}, "no token has the id 1048576"),
  ],
)
def test_settings_that_the_engine_has_no_room_for_are_refused(
  engine: Engine, asked: list[Request], settings: dict[str, Any], message: str
) -> None:
  generation = Generation(**{"max_new_tokens": NEW, **settings})
  bad = dataclasses.replace(asked[0], generation=generation)
  wrong, right = engine.answer([bad, asked[0]])
  assert message in wrong.error
  assert not right.error
  assert not engine.fits(generation)


def test_settings_and_turns_go_to_every_process() -> None:
  generation = Generation(temperature=0.5, stop=("a", "b"), logit_bias=((3, 1.5),), seed=-7)
  request = Request("why?", (), "Be brief.", 4, (("what?", "a cat"),), generation)
  assert broadcast._request(broadcast._packed(request)) == request


def test_records_state_other_settings_only_where_they_are_asked_for() -> None:
  plain = Generation(seed=3).stated()
  assert list(plain) == [
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "num_beams",
    "stop",
    "seed",
  ]
  assert Generation(min_p=0.1).stated() == {**Generation().stated(), "min_p": 0.1}
